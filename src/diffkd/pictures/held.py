"""Parts of a split: to train on, and held out of training to choose on."""

from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.pictures.files import Item, Pictures, Source
from diffkd.pictures.loading import BatchedSplit, Samples, Split, Streamed
from diffkd.pictures.memory import ArraySplit, hold_out


class _Some:
    """The samples of a map-style split at some places.

    Args:
        whole: all of them.
        places: `(N,)` int64.
    """

    def __init__(self, whole: Samples, places: np.ndarray) -> None:
        self.whole, self.places = whole, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.whole[int(self.places[index])]

    @property
    def groups(self) -> np.ndarray | None:
        """Which samples fill batches together; None where any do."""
        groups = getattr(self.whole, "groups", None)
        return None if groups is None else np.asarray(groups)[self.places]


class _SomeBatches:
    """The samples of a batched split at some places."""

    def __init__(self, whole: BatchedSplit, places: np.ndarray) -> None:
        self.whole, self.places = whole, places

    def __len__(self) -> int:
        return len(self.places)

    def to(self, device: torch.device) -> "_SomeBatches":
        """The same samples on a device."""
        return _SomeBatches(self.whole.to(device), self.places)

    def batch(self, indices: Tensor, seed: int) -> Batch:
        """The samples at `indices` `(B,)`, each as it is in the whole."""
        found = self.whole.batch(torch.from_numpy(self.places)[indices.cpu()], seed)
        return found._replace(indices=indices)


class Renumbered:
    """The pictures of a source with other class indices.

    Args:
        source: the pictures.
        places: `(K,)`, the new index of each class.
    """

    def __init__(self, source: Source, places: np.ndarray) -> None:
        self.source, self._new = source, places
        found = classes_in(source)
        self.targets = None if found is None else places[found]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        item = self.source[index]
        return item._replace(target=None if item.target is None else int(self._new[item.target]))


def can_renumber(split: Split) -> bool:
    """Whether a split's class indices are the library's own to change."""
    return type(split) in (ArraySplit, Pictures)


def renumbered(split: Split, places: np.ndarray) -> Split:
    """The samples of a split with other class indices; `places` `(K,)` has the new one of each class.

    Raises:
        UserError: the split does not say how.
    """
    if isinstance(split, ArraySplit) and can_renumber(split):
        return split.renumbered(places)
    if not isinstance(split, Pictures) or not can_renumber(split):
        raise UserError(
            "data.class_order numbers classes of whole pictures that have names; the data say the numbers "
            "themselves (values of masks, ids of boxes, rows of a stream): leave it out"
        )
    found = copy(split)
    found.source = Renumbered(split.source, places)
    return found


def part_of(split: Split, places: np.ndarray, *, training: bool) -> Split:
    """The samples of a split to train on at some places.

    Args:
        split: one whose `part(places, training=...)` is called where it has that; else it is wrapped.
        places: `(N,)` int64.
        training: augmented; else as a test split shows them, where the split says how.
    """
    if isinstance(split, Streamed):
        raise UserError("a stream has no parts: give data that can be read in any order")
    if says(split, "part"):
        return split.part(places, training=training)  # type: ignore[union-attr,no-any-return]
    return _SomeBatches(split, places) if isinstance(split, BatchedSplit) else _Some(split, places)


def says(split: Split, method: str) -> bool:
    """Whether a split has a method of its own: one that it inherits does not know what a subclass adds."""
    for kind in type(split).__mro__:
        if method in vars(kind):
            return True
        if {"batch", "sample", "__getitem__"} & vars(kind).keys():
            return False
    return False


def classes_in(split: Any) -> np.ndarray | None:
    """Class `(N,)` of every sample, where a split, or what it reads from, lists them; else None."""
    found = next((v for v in (getattr(split, n, None) for n in ("targets", "labels")) if v is not None), None)
    if callable(found):
        found = found()
    if found is None:
        source = getattr(split, "source", None) or getattr(split, "whole", None)
        places = getattr(split, "places", None)
        below = None if source is None else classes_in(source)
        return below if below is None or places is None else below[places]
    try:
        classes = np.asarray(found.cpu() if isinstance(found, Tensor) else found)
    except ValueError:  # of different lengths: boxes, say
        return None
    return classes if classes.shape == (len(split),) and classes.dtype.kind in "iu" else None


def hold_out_samples(split: Split, fraction: float) -> tuple[Split, Split, tuple[str, ...]]:
    """What stays to train on, what is held out, always the same, and notes that say so.

    Args:
        split: to train on.
        fraction: share held out, of every class where samples have one class each.

    Raises:
        UserError: `fraction` is not between 0 and 1, or there are too few samples.
    """
    if isinstance(split, Streamed):
        raise UserError("nothing can be held out of a stream: leave out data.val_fraction and data.test_on")
    kept, held = hold_out(len(split), fraction, classes_in(split))
    notes = [f"{len(held)} of {len(split)} training samples held out for validation"]
    if not says(split, "part"):
        notes.append(
            "the samples held out are seen as in training: a split that has `part(places, training=...)` "
            "says how they are seen without augmentation"
        )
    parts = (part_of(split, p, training=t) for p, t in ((kept, True), (held, False)))
    return *parts, tuple(notes)  # type: ignore[return-value]


def spread(classes: np.ndarray | None, count: int, most: int) -> np.ndarray:
    """Places of at most so many of `count` samples, evenly over their classes, in order; always the same.

    Args:
        classes: `(count,)` class of each; None spreads them evenly over the whole.
        count: of the samples.
        most: to be chosen.

    >>> spread(np.array([0, 0, 0, 0, 1, 1, 2]), 7, 5).tolist()
    [0, 1, 4, 5, 6]
    """
    if count <= most:
        return np.arange(count)
    if classes is None:
        return np.linspace(0, count - 1, most).round().astype(np.int64)
    order = classes.argsort(kind="stable")
    sizes = np.unique(classes, return_counts=True)[1]
    turn = np.empty(count, np.int64)
    turn[order] = np.arange(count) - np.repeat(sizes.cumsum() - sizes, sizes)
    return np.sort(turn.argsort(kind="stable")[:most])
