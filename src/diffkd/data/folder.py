"""Folders of pictures: one folder a class, split or not; or unlabelled pictures in any folder."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import numpy as np

from diffkd.data.base import Data, of_pictures
from diffkd.errors import UserError
from diffkd.pictures.augment import PictureOptions
from diffkd.pictures.files import Files, Source, held_out
from diffkd.pictures.options import (
    class_count,
    class_notes,
    data_folder,
    natural_key,
    quoted,
    same_classes,
    spread,
)
from diffkd.pictures.scan import Scan
from diffkd.pictures.splits import find_splits, innermost, inside


@spread(PictureOptions)
def build(
    root: str | None,
    *,
    val_fraction: float = 0.1,
    test_folder: str | None = None,
    labels: Literal["given", "none"] = "given",
    num_classes: int | None = None,
    class_order: list[str] | Literal["name", "natural"] = "name",
    options: PictureOptions,
) -> Data:
    """Pictures in `train/CLASS/`, tested on those in `val/CLASS/`; or in `CLASS/` alone.

    Classes are numbered in the order of their folders' names. A class may lack test pictures.
    The mean and standard deviation are ImageNet's, as most models want them.

    Args:
        root: the folder that holds `train` and one of `val`, `valid`, `validation`, `test` (the first
            that is there; `training`, `Train` and the like are understood), or the class folders.
        val_fraction: share of every class to test on where there is no such folder, always the same.
        test_folder: name of the folder to test on, where it is another.
        labels: "none" takes every picture beneath the training folder, whatever the folders' names,
            and trains without labels; the test folder keeps its classes if it has any.
        num_classes: needed without labels; else checked against the class folders.
        class_order: how classes are numbered: "name", as the alphabet has their folders' names (1, 10,
            2); "natural", numbers in names counting as such (1, 2, 10); or all names in their order.
        options: how pictures are augmented.

    Raises:
        UserError: a folder is missing or cannot be read, a class has no training pictures, or a test
            folder is no class.
    """
    folder, notes = innermost(data_folder(root, "folder"))
    splits = find_splits(folder, test_folder)
    notes += splits.notes
    place = folder if splits.train is None else folder / splits.train
    test_place = None if splits.test is None else folder / splits.test
    others = set(inside(folder)) - {splits.train, splits.test}
    if labels == "given" and test_folder is None and others and place != folder and not inside(place):
        place, test_place = folder, None  # `train` is a class, beside `car` and `ship`
    scans = [Scan(place)]
    classes: tuple[str, ...] = ()
    if labels == "none":
        found = _unlabelled(scans[0])
    else:
        folders = _folders(scans[0])
        classes, told = _ordered(list(folders), class_order, place)
        notes += told
        found = _labelled(scans[0], classes, folders)
    train: Source = found
    test: Source
    if test_place is None:
        train, test, note = held_out(found, found.targets, val_fraction, str(place))
        notes += note
        if found.targets is not None:
            notes += class_notes(len(classes), found.targets, found.targets[test.places], classes)
    else:
        scans.append(Scan(test_place))
        folders = _folders(scans[1])
        if classes:
            same_classes(classes, list(folders), str(test_place))
        elif folders:
            classes, told = _ordered(list(folders), class_order, test_place)
            notes += told
        test = _labelled(scans[1], classes, folders, all_of_them=False) if classes else _unlabelled(scans[1])
        notes += class_notes(len(classes), found.targets, test.targets, classes) if classes else ()
    return of_pictures(
        options,
        train,
        test,
        num_classes=class_count(num_classes, classes),
        class_names=classes,
        notes=notes + tuple(note for scan in scans for note in scan.notes()),
    )


def _ordered(
    names: list[str], order: list[str] | Literal["name", "natural"], folder: Path
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Classes in the order wanted, and a note where another is as likely."""
    if isinstance(order, list):
        if sorted(order) != sorted(names):
            missing, extra = sorted(set(names) - set(order)), sorted(Counter(order) - Counter(names))
            what = f"lacks {quoted(missing)}" if missing else f"has {quoted(extra)} too often"
            raise UserError(f"data.class_order {what}: it must name each class folder of '{folder}' once")
        return tuple(order), ()
    natural = sorted(names, key=natural_key)
    if order == "natural" or natural == names:
        return tuple(natural), ()
    place = next(place for place, pair in enumerate(zip(names, natural, strict=True)) if pair[0] != pair[1])
    return tuple(names), (
        f"classes are in the order of the alphabet: '{names[place]}' is class {place}; "
        f"data.class_order=natural counts numbers in names, so that '{natural[place]}' is",
    )


def _folders(scan: Scan) -> dict[str, str]:
    """Class folders by their names, as Unicode composes them.

    Raises:
        UserError: two are called alike.
    """
    found: dict[str, str] = {}
    for folder in scan.folders():
        if (name := normalize("NFC", folder)) in found:
            raise UserError(f"two folders in '{scan.folder}' are called '{name}'; rename one of them")
        found[name] = folder
    return found


def _labelled(
    scan: Scan, classes: tuple[str, ...], folders: dict[str, str], all_of_them: bool = True
) -> Files:
    """Pictures in class folders, however deep in them.

    Args:
        scan: of the folder around them.
        classes: in the order of the class indices.
        folders: of those classes that are there.
        all_of_them: whether every class needs a picture.
    """
    if not folders:
        what = "pictures but no class folders" if scan.pictures() else "no pictures"
        raise UserError(f"'{scan.folder}' holds {what}; give one folder a class, or set data.labels=none")
    counts = []

    def paths() -> Iterator[str]:
        for name in classes:
            inner = scan.pictures(folders[name]) if name in folders else []
            counts.append(len(inner))
            yield from (f"{folders[name]}/{path}" for path in inner)

    files = Files(scan.folder, paths(), None)
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty and (all_of_them or len(empty) == len(classes)):
        what = f"the class folder{'s' * (len(empty) > 1)} {quoted(empty)} of '{scan.folder}'"
        raise UserError(f"no pictures in {what}" + "".join(f" ({note})" for note in scan.notes()))
    files.targets = np.repeat(np.arange(len(classes)), counts)
    return files


def _unlabelled(scan: Scan) -> Files:
    """All pictures beneath a folder."""
    paths = scan.pictures()
    if not paths:
        raise UserError(f"no pictures in '{scan.folder}'")
    return Files(scan.folder, paths, None)
