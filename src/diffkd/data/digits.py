"""scikit-learn's handwritten digits: 1,797 real pictures of 8x8 pixels, nothing to download."""

import numpy as np
import torch

from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.pictures.arrays import check_padding
from diffkd.pictures.memory import ArraySplit, channel_statistics

_TEST_SAMPLES = 360
_SPLIT_SEED = 0


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
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if root is not None:
        raise UserError(f"data 'digits' comes with scikit-learn; leave out data.root='{root}'")
    if shift < 0:
        raise UserError(f"data.shift={shift} is negative; give 0 or more pixels")
    check_padding("shift", shift, (8, 8))
    digits = load_digits()
    places = np.arange(len(digits.target))
    train, test = train_test_split(
        places, test_size=_TEST_SAMPLES, stratify=digits.target, random_state=_SPLIT_SEED
    )
    images = torch.from_numpy(np.rint(digits.images * 255 / 16).astype(np.uint8))[:, None]
    targets = torch.from_numpy(digits.target.astype(np.int64))
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
