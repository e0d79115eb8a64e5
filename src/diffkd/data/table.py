"""Lists of pictures in CSV files, one for each split."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from diffkd.data.base import Data, of_pictures
from diffkd.errors import UserError
from diffkd.pictures.augment import PictureOptions
from diffkd.pictures.files import Source, held_out
from diffkd.pictures.listed import Labels, PictureList, read_list
from diffkd.pictures.options import class_count, class_notes, data_folder, quoted, spread
from diffkd.pictures.splits import TEST_NAMES, TRAIN_NAMES

_WHOLE_NUMBER = re.compile(r"-?[0-9]+")
_NUMBER = re.compile(r"[-+]?[0-9][0-9.,]*(e[-+]?[0-9]+)?", re.IGNORECASE)
_WAY = "data.first_label and data.num_classes say what there is"
_ENDINGS = ("csv", "tsv", "txt")


@spread(PictureOptions)
def build(
    root: str | None,
    *,
    train_file: str | None = None,
    test_file: str | None = None,
    path_column: str | None = None,
    label_column: str | None = None,
    first_label: int = 0,
    val_fraction: float = 0.1,
    labels: Literal["given", "none"] = "given",
    num_classes: int | None = None,
    options: PictureOptions,
) -> Data:
    """A folder with `train.csv` and `val.csv` (or `test.csv`), each with a line of column names.

    Commas, semicolons, tabs or bars stand between the columns. Without names of columns, that of paths is
    found, and the other of two holds the labels. Paths are relative to that folder or one in it, or
    absolute; those of Windows, and of another machine, are understood. Labels that are all whole numbers
    are class indices; others are names of classes, numbered in the order of the alphabet.

    Args:
        root: the folder.
        train_file: name of the file to train on, where it has another.
        test_file: name of the file to test on, likewise; where there is none, a column `split` may say which
            rows are for what.
        path_column: name of the column of paths; "path", "filename" and the like are found.
        label_column: name of the column of labels; "label", "class" and the like are found. Further
            columns are left alone.
        first_label: the number of the first class, where labels are numbers.
        val_fraction: share of every class to test on where there is only `train.csv`.
        labels: "none" trains without labels; the test file keeps its labels if it has the column.
        num_classes: needed without labels; else checked, but may exceed the highest class index.
        options: how pictures are augmented.

    Raises:
        UserError: a file, column, picture or label is missing or wrong; it is named.
    """
    folder = data_folder(root, "table")
    given = labels == "given"
    trains = _find_all(folder, train_file, TRAIN_NAMES)
    place = trains[0] if trains else _only_table(folder)
    tables = [read_list(place, path_column, label_column, "needed" if given else "ignored")]
    tests = [found for found in _find_all(folder, test_file, TEST_NAMES) if found != place]
    held = tests[0] if tests else None
    if held is not None:
        kind: Labels = "if named" if not given else "if there" if test_file is None else "needed"
        tables.append(read_list(held, path_column, label_column, kind))
        if given and tables[1].codes is None:
            left_out = (f"'{tables[1].file.name}' has no labels, and is not used",)
            tables = [tables[0]._replace(notes=tables[0].notes + left_out)]
    if len(tables) == 1 and tables[0].splits is not None and set(tables[0].splits.tolist()) & {*TRAIN_NAMES}:
        tables = _by_column(tables[0])
    classes, count = _index(tables, num_classes, first_label)
    known = [table.pictures.targets for table in tables]
    notes = tuple(dict.fromkeys(note for table in tables for note in table.notes)) + _odd(tables[0].labels)
    train: Source = tables[0].pictures
    test: Source
    if len(tables) == 1:
        train, test, note = held_out(train, known[0], val_fraction, str(folder))
        notes = note + notes
        known.append(None if known[0] is None else known[0][test.places])
    else:
        test = tables[1].pictures
    if len(tests) > 1:
        passed = quoted([other.name for other in tests[1:]])
        notes += (f"tested on '{tests[0].name}', not on {passed}: data.test_file chooses",)
    notes += class_notes(count, known[0], known[1], classes)
    return of_pictures(options, train, test, num_classes=count, class_names=classes, notes=notes)


def _find_all(folder: Path, name: str | None, stems: Sequence[str]) -> list[Path]:
    """The file of a split: that of a name, or the usual ones that are there, the usual first."""
    if name is not None:
        if not (folder / name).is_file():
            raise UserError(f"no file '{folder / name}'")
        return [folder / name]
    there = {place.name.lower(): place for place in sorted(folder.iterdir(), reverse=True) if place.is_file()}
    usual = (f"{stem}.{ending}" for stem in stems for ending in _ENDINGS)
    return [there[name] for name in usual if name in there]


def _by_column(table: PictureList) -> list[PictureList]:
    """The rows to train on and those to test on, as a column says."""
    assert table.splits is not None
    names = set(table.splits.tolist())
    tests = [name for name in TEST_NAMES if name in names]
    shown = quoted([*(name for name in TRAIN_NAMES if name in names), *tests[:1]])
    told = f"rows of '{table.file.name}' are taken as its column of splits says: {shown}"
    told += f", not {quoted(tests[1:])}" * (len(tests) > 1)
    others = [name for name in table.splits.tolist() if name not in (*TRAIN_NAMES, *TEST_NAMES)]
    if others:
        told += f"; {len(others)} rows that say {quoted(list(dict.fromkeys(others)), 4)} are left out"
    train = table.part(TRAIN_NAMES)
    train = train._replace(notes=(*train.notes, told))
    return [train, *(table.part([name]) for name in tests[:1])]


def _only_table(folder: Path) -> Path:
    every = (place for ending in _ENDINGS[:2] for place in folder.glob(f"*.{ending}"))
    found = sorted(filter(Path.is_file, every))
    if len(found) == 1:
        return found[0]
    there = f"; there are {quoted([place.name for place in found])}" if found else ""
    raise UserError(f"no file '{folder / 'train.csv'}'{there}: data.train_file=NAME, data.test_file=NAME")


def _index(
    tables: list[PictureList], num_classes: int | None, first_label: int
) -> tuple[tuple[str, ...], int]:
    """Gives the pictures their class indices; the classes' names if they have any, and their number."""
    labels = [label for table in tables for label in table.labels]
    if all(_WHOLE_NUMBER.fullmatch(label) for label in labels):
        highest = max((int(label) - first_label for label in labels), default=-1)
        count = num_classes or _counted(tables, highest)
        known = {label: int(label) - first_label for label in labels}
        known = {label: index for label, index in known.items() if 0 <= index < count}
        for table in tables:
            _number(table, known, f"outside {first_label} to {first_label + count - 1}; {_WAY}")
        return (), count
    first = next(table for table in tables if table.labels)
    classes = tuple(sorted(first.labels))
    known = {name: index for index, name in enumerate(classes)}
    for table in tables:
        _number(table, known, f"no class of '{first.file.name}'")
    return classes, class_count(num_classes, classes)


def _odd(labels: Sequence[str]) -> tuple[str, ...]:
    """A note on labels that are taken for names although they look like numbers."""
    numbers = [label for label in labels if _NUMBER.fullmatch(label)]
    if not numbers or all(_WHOLE_NUMBER.fullmatch(label) for label in labels):
        return ()
    others = [label for label in labels if not _WHOLE_NUMBER.fullmatch(label)]
    return (f"labels are taken for names of classes, for not all are whole numbers: {quoted(others)}",)


def _counted(tables: list[PictureList], highest: int) -> int:
    """The number of classes as the labels show it."""
    rows = sum(0 if table.codes is None else len(table.codes) for table in tables)
    if rows == 0:
        return class_count(None)
    # as many rows as there are, though the array is not made: what matters is the highest
    return class_count(None, labels={f"'{tables[0].file}'": np.full(rows, max(highest, 0), dtype=object)})


def _number(table: PictureList, known: dict[str, int], otherwise: str) -> None:
    if table.codes is None:
        return
    for code, label in enumerate(table.labels):
        if label not in known:
            row = int(np.argmax(table.codes == code)) + 2
            raise UserError(f"label '{label[:40]}' in row {row} of '{table.file}' is {otherwise}")
    table.pictures.targets = np.array([known[label] for label in table.labels], np.int64)[table.codes]
