"""scikit-learn's handwritten digits: 1,797 real pictures of 8x8 pixels, nothing to download."""

import numpy as np
import torch

from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.pictures.arrays import check_padding
from diffkd.pictures.memory import ArraySplit, channel_statistics
from diffkd.pictures.real_digits import read_digits

_TEST_SAMPLES = 360


def build(root: str | None = None, *, shift: int = 1) -> Data:
    """The digits, with one fixed split of 1,437 training and 360 test pictures, stratified by class.

    Source: https://archive.ics.uci.edu/dataset/80 (the test part, as bundled with scikit-learn).

    Args:
        root: must be None, for the pictures come with scikit-learn.
        shift: training pictures move by up to so many pixels each way, black coming in.

    Raises:
        UserError: a root was given, or `shift` is negative or more than 8.

    >>> data = build()
    >>> len(data.train), len(data.test), data.image_shape
    (1437, 360, (1, 8, 8))
    """
    if root is not None:
        raise UserError(f"data 'digits' comes with scikit-learn; leave out data.root='{root}'")
    if shift < 0:
        raise UserError(f"data.shift={shift} is negative; give 0 or more pixels")
    check_padding("shift", shift, (8, 8))
    digits = read_digits(_TEST_SAMPLES)
    train, test = digits.train, digits.test
    images = torch.from_numpy(np.rint(digits.images * 255 / 16).astype(np.uint8))[:, None]
    targets = torch.from_numpy(digits.labels)
    mean, std = channel_statistics(images[train])
    return Data(
        train=ArraySplit(images[train], targets[train], crop_padding=shift),
        test=ArraySplit(images[test], targets[test]),
        num_classes=10,
        image_shape=(1, 8, 8),
        mean=mean,
        std=std,
        class_names=tuple("0123456789"),
    )
