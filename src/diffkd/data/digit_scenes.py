"""Made scenes of scikit-learn's handwritten digits, for classification, segmentation and detection."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffkd.batch import Batch
from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.pictures.arrays import check_padding
from diffkd.pictures.memory import ArraySplit, channel_statistics
from diffkd.pictures.real_digits import read_digits
from diffkd.pictures.scenes import SceneOptions, Scenes, compose

Kind = Literal["classification", "segmentation", "detection"]
_DIGITS = tuple("0123456789")
# Several digits want room; one is easy to find, so there is more about it.
_USUAL: dict[str, dict[str, Any]] = {
    "classification": {"size": 28},
    "segmentation": {"size": 32, "scale": (0.65, 0.95), "clutter": 1},
    "detection": {"size": 96, "digits": (1, 5), "scale": (0.2, 0.4), "clutter": 3},
}
_COUNTS = {"classification": (4000, 2000), "segmentation": (3000, 500), "detection": (2000, 500)}


def build(
    root: str | None = None,
    *,
    kind: Kind = "classification",
    size: int | None = None,
    train_scenes: int | None = None,
    test_scenes: int | None = None,
    clutter: int | None = None,
    noise: float = 0.05,
    shift: int = 2,
) -> Data:
    """Scenes made at the start, always the same; training and test scenes are of different people's digits.

    Source of the digits: https://archive.ics.uci.edu/dataset/80 (as bundled with scikit-learn). The
    scenes are made: grounds, clutter, sizes, angles and colours are drawn.

    - classification: one digit among pieces of others; the target is the digit.
    - segmentation: one large digit over a piece of another; the target is a label map, 0 for the
      ground and d + 1 for digit d.
    - detection: one to five digits; the target is a dict with `boxes` `(n, 4)` (left, top, right,
      bottom in pixels) and `labels` `(n,)`, 0 to 9.

    Args:
        root: must be None, for the digits come with scikit-learn.
        kind: which task the scenes are for.
        size: height and width in pixels; 28, 32 or 96 by kind if not given.
        train_scenes: how many to train on; 4,000, 3,000 or 2,000 by kind if not given.
        test_scenes: how many to test on; 2,000 to classify, else 500, if not given.
        clutter: pieces of digits that lie about in each.
        noise: standard deviation of the pixels' noise, on the scale 0 to 1.
        shift: training pictures to classify move by up to so many pixels each way, black coming in.

    Raises:
        UserError: a root was given, or an option is out of its range.

    >>> data = build(kind="segmentation", size=32, train_scenes=3, test_scenes=2)
    >>> data.num_classes, data.train.batch(torch.tensor([0, 2]), seed=0).targets.shape
    (11, torch.Size([2, 32, 32]))
    """
    if root is not None:
        raise UserError(f"data 'digit_scenes' comes with scikit-learn; leave out data.root='{root}'")
    given = {"size": size, "clutter": clutter, "noise": noise}
    options = SceneOptions(**_USUAL[kind] | {k: v for k, v in given.items() if v is not None})
    counts = [_COUNTS[kind][i] if n is None else n for i, n in enumerate((train_scenes, test_scenes))]
    if shift < 0:
        raise UserError(f"data.shift={shift} is negative; give 0 or more pixels")
    check_padding("shift", shift, (options.size,))
    for name, count in zip(("train_scenes", "test_scenes"), counts, strict=True):
        if count < 1:
            raise UserError(f"data.{name}={count}: needs at least 1")
    train, test = (
        compose(*stock, count, seed, options)
        for seed, (stock, count) in enumerate(zip(_stocks(), counts, strict=True))
    )
    mean, std = channel_statistics(train.images)
    return Data(
        train=_split(train, kind, shift),
        test=_split(test, kind, 0),
        num_classes=11 if kind == "segmentation" else 10,
        image_shape=(3, options.size, options.size),
        mean=mean,
        std=std,
        class_names=("ground", *_DIGITS) if kind == "segmentation" else _DIGITS,
        notes=(f"made scenes of real digits: {counts[0]} to train on, {counts[1]} to test on",),
    )


def _stocks() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Digits `(M, 8, 8)`, 0 to 1, and which they are, to train on and to test on."""
    found = read_digits(600)
    images = torch.from_numpy(found.images / 16).float()
    labels, places = torch.from_numpy(found.labels), (found.train, found.test)
    train, test = ((images[torch.from_numpy(p)], labels[torch.from_numpy(p)]) for p in places)
    return train, test


def _split(scenes: Scenes, kind: Kind, shift: int) -> ArraySplit:
    if kind == "classification":
        return ArraySplit(scenes.images, scenes.labels[:, 0], crop_padding=shift)
    if kind == "segmentation":
        return ArraySplit(scenes.images, scenes.masks.long())
    return BoxScenes(scenes)


class BoxScenes(ArraySplit):
    """Scenes whose targets are a list of dicts with `boxes` and `labels`."""

    def __init__(self, scenes: Scenes) -> None:
        super().__init__(scenes.images, None)
        self.boxes, self.labels = scenes.boxes, scenes.labels

    def part(self, places: np.ndarray, *, training: bool) -> "BoxScenes":
        """The scenes at some places `(n,)`."""
        found = super().part(places, training=training)
        assert isinstance(found, BoxScenes)
        found.boxes, found.labels = self.boxes[places], self.labels[places]
        return found

    def batch(self, indices: Tensor, seed: int) -> Batch:
        """The scenes at `indices` `(B,)`."""
        found = super().batch(indices, seed)
        targets = []
        for boxes, labels in zip(self.boxes[indices], self.labels[indices], strict=True):
            there = labels >= 0
            boxes, labels = (x[there].to(found.images[0].device) for x in (boxes, labels))
            targets.append({"boxes": boxes, "labels": labels})
        return found._replace(targets=targets)
