"""Folders of pictures: one folder a class, split or not; or unlabelled pictures in any folder."""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.pictures.files import (
    ENDINGS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Files,
    PictureOptions,
    Source,
    held_out,
)
from diffkd.pictures.options import class_count, data_folder, quoted, same_classes, spread

_TEST_NAMES = ("val", "valid", "validation", "test")


@spread(PictureOptions)
def build(
    root: str | None,
    *,
    val_fraction: float = 0.1,
    test_folder: str | None = None,
    labels: Literal["given", "none"] = "given",
    num_classes: int | None = None,
    options: PictureOptions,
) -> Data:
    """Pictures in `train/CLASS/`, tested on those in `val/CLASS/`; or in `CLASS/` alone.

    Classes are numbered in the order of their folders' names. The mean and standard deviation are
    ImageNet's, as most models want them.

    Args:
        root: the folder that holds `train` and one of `val`, `valid`, `validation`, `test` (the first
            that is there), or the class folders.
        val_fraction: share of every class to test on where there is no such folder, always the same.
        test_folder: name of the folder to test on, where it is another.
        labels: "none" takes every picture beneath the training folder, whatever the folders' names,
            and trains without labels; the test folder keeps its classes if it has any.
        num_classes: needed without labels; else checked against the class folders.
        options: how pictures are augmented.

    Raises:
        UserError: a folder is missing or empty, or the classes of training and test differ.
    """
    folder = data_folder(root, "folder")
    test_place, notes = _find_test(folder, test_folder)
    place = folder / "train" if (folder / "train").is_dir() else folder
    if test_place is not None and place == folder:
        raise UserError(f"'{folder}' has a folder '{test_place.name}' but none named 'train'")
    found, classes = _unlabelled(place) if labels == "none" else _labelled(place)
    train: Source = found
    test: Source
    if test_place is None:
        train, test, notes = held_out(found, found.targets, val_fraction, str(place))
    else:
        flat = labels == "none" and not _folders_in(test_place)
        test, test_classes = _unlabelled(test_place) if flat else _labelled(test_place)
        if classes:
            same_classes(classes, test_classes, str(test_place))
        classes = test_classes
    return Data(
        *options.splits(train, test),
        num_classes=class_count(num_classes, classes),
        image_shape=options.image_shape,
        view=options.view,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        class_names=classes,
        notes=notes,
    )


def _find_test(folder: Path, name: str | None) -> tuple[Path | None, tuple[str, ...]]:
    """The folder to test on, None if there is none, and a note where there was a choice."""
    if name is not None:
        if not (folder / name).is_dir():
            raise UserError(f"data.test_folder='{name}' is not a folder in '{folder}'")
        return folder / name, ()
    found = [name for name in _TEST_NAMES if (folder / name).is_dir()]
    if len(found) < 2:
        return (folder / found[0] if found else None), ()
    return folder / found[0], (
        f"tested on '{found[0]}', not on {quoted(found[1:])}: data.test_folder chooses",
    )


def _labelled(folder: Path) -> tuple[Files, tuple[str, ...]]:
    """Pictures in class folders, however deep in them, and the classes."""
    classes = _folders_in(folder)
    if not classes:
        what = "pictures but no class folders" if _pictures_in(folder) else "no pictures"
        raise UserError(f"'{folder}' holds {what}; give one folder a class, or set data.labels=none")
    found = [_pictures_in(folder / name) for name in classes]
    empty = [name for name, paths in zip(classes, found, strict=True) if not paths]
    if empty:
        raise UserError(
            f"no pictures in the class folder{'s' * (len(empty) > 1)} {quoted(empty)} of '{folder}'"
        )
    paths = [f"{name}/{path}" for name, paths in zip(classes, found, strict=True) for path in paths]
    targets = np.repeat(np.arange(len(classes)), [len(paths) for paths in found])
    return Files(folder, paths, targets), tuple(classes)


def _unlabelled(folder: Path) -> tuple[Files, tuple[str, ...]]:
    """All pictures beneath a folder, and no classes."""
    paths = _pictures_in(folder)
    if not paths:
        raise UserError(f"no pictures in '{folder}'")
    return Files(folder, paths, None), ()


def _folders_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def _pictures_in(folder: Path) -> list[str]:
    """Paths of the pictures beneath a folder, relative to it, in the order of their names."""
    found = []
    for where, inner, files in os.walk(folder, followlinks=True):
        inner[:] = [name for name in inner if name[0] != "."]
        start = "" if where == str(folder) else Path(where).relative_to(folder).as_posix() + "/"
        found += [start + name for name in files if name[0] != "." and name.lower().endswith(ENDINGS)]
    return sorted(found)
