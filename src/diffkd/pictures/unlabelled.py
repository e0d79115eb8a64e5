"""Pictures without labels beside labelled ones, seen as these are."""

from pathlib import Path
from typing import Any

import numpy as np

from diffkd.batch import UNLABELLED
from diffkd.errors import UserError
from diffkd.pictures.files import Files
from diffkd.pictures.held import says
from diffkd.pictures.loading import BatchedSplit, Samples, Split, Streamed
from diffkd.pictures.memory import ArraySplit
from diffkd.pictures.scan import Scan


def unlabelled_files(folder: str) -> tuple[Files, tuple[str, ...]]:
    """All pictures beneath a folder, and a note on what else is there.

    Raises:
        UserError: it is no folder, or holds no picture.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        found = "is a file, not a folder" if place.exists() else "does not exist"
        raise UserError(f"data.unlabelled='{folder}' {found}")
    scan = Scan(place)
    paths = scan.pictures()
    if not paths:
        raise UserError(f"no pictures in data.unlabelled='{folder}'")
    return Files(place, paths, np.full(len(paths), UNLABELLED)), scan.notes()


def seen_alike(train: Split, pictures: Files) -> Split:
    """Pictures without labels as the training samples are seen; their targets are `UNLABELLED`.

    Raises:
        UserError: the training split does not say how it would see others.
    """
    if not says(train, "unlabelled"):
        raise UserError(
            "data.unlabelled: this data set does not say how it would see other pictures; leave it out, or "
            "give diffkd.Data(..., unlabelled=...) a split of them"
        )
    if isinstance(train, ArraySplit):
        return train.unlabelled([pictures[i][:2] for i in range(len(pictures))])
    return train.unlabelled(pictures)  # type: ignore[union-attr,no-any-return]


def joined(labelled: Split, unlabelled: Split) -> Split:
    """Labelled samples, then those without labels.

    Raises:
        UserError: one is dealt out in batches, the other is not.
    """
    if isinstance(labelled, ArraySplit) and isinstance(unlabelled, ArraySplit):
        return labelled.joined(unlabelled)
    kinds = BatchedSplit | Streamed
    if isinstance(labelled, kinds) or isinstance(unlabelled, kinds):
        raise UserError("data.unlabelled: labelled and unlabelled samples must be splits of one kind")
    return _Joined(labelled, unlabelled)


class _Joined:
    """The samples of two map-style splits, one after the other; those of the second have no label."""

    def __init__(self, labelled: Samples, unlabelled: Samples) -> None:
        self.labelled, self.unlabelled = labelled, unlabelled

    def __len__(self) -> int:
        return len(self.labelled) + len(self.unlabelled)

    def __getitem__(self, index: int) -> Any:
        if index < len(self.labelled):
            return self.labelled[index]
        sample = self.unlabelled[index - len(self.labelled)]
        bare = sample is not None and not isinstance(sample, tuple | list)
        return (sample, UNLABELLED) if bare else sample
