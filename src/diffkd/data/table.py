"""Lists of pictures in CSV files, one for each split."""

import csv
import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from diffkd.data.base import Data, of_pictures
from diffkd.errors import UserError, nearest
from diffkd.pictures.augment import PictureOptions
from diffkd.pictures.decoding import ENDINGS
from diffkd.pictures.files import Files, Source, held_out
from diffkd.pictures.options import class_count, class_notes, data_folder, quoted, spread
from diffkd.pictures.rows import open_rows
from diffkd.pictures.scan import RegularFiles

_WHOLE_NUMBER = re.compile(r"-?[0-9]+")
_ENDINGS = ("csv", "tsv", "txt")
_PATHS = ("path", "filename", "file_name", "file", "filepath", "file_path", "image", "image_path", "img")
_LABELS = ("label", "class", "class_name", "category", "target", "labels", "y")


class _Table(NamedTuple):
    """The rows of one file, in few blocks of memory.

    Attributes:
        file: it.
        pictures: the files that it lists.
        codes: `(N,)` places in `labels`; None where labels are not wanted.
        labels: the different labels, in the order of their first rows.
        notes: columns that had to be found.
    """

    file: Path
    pictures: Files
    codes: np.ndarray | None
    labels: tuple[str, ...]
    notes: tuple[str, ...]


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
    """A folder with `train.csv` and `test.csv` (or `val.csv`), each with a line of column names.

    Commas, semicolons, tabs or bars stand between the columns. Without names of columns, that of paths is
    found, and the other of two holds the labels. Paths are relative to that folder, or absolute;
    those of Windows are understood. Labels that are all whole numbers are class
    indices; others are names of classes, numbered in the order of the alphabet.

    Args:
        root: the folder.
        train_file: name of the file to train on, where it has another.
        test_file: name of the file to test on, likewise.
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
    place = _find(folder, train_file, ("train",)) or _only_table(folder)
    tables = [_read(place, path_column, label_column, wanted=given)]
    if (held := _find(folder, test_file, ("test", "val"))) is not None:
        tables.append(_read(held, path_column, label_column, needed=given))
    classes, count = _index(tables, num_classes, first_label)
    known = [table.pictures.targets for table in tables]
    notes = tuple(dict.fromkeys(note for table in tables for note in table.notes))
    train: Source = tables[0].pictures
    test: Source
    if len(tables) == 1:
        train, test, note = held_out(train, known[0], val_fraction, str(folder))
        notes = note + notes
        known.append(None if known[0] is None else known[0][test.places])
    else:
        test = tables[1].pictures
    notes += class_notes(count, known[0], known[1], classes)
    return of_pictures(options, train, test, num_classes=count, class_names=classes, notes=notes)


def _find(folder: Path, name: str | None, stems: Sequence[str]) -> Path | None:
    """The file of a split: that of a name, or the first usual one that is there."""
    if name is not None:
        if not (folder / name).is_file():
            raise UserError(f"no file '{folder / name}'")
        return folder / name
    usual = (folder / f"{stem}.{ending}" for stem in stems for ending in _ENDINGS)
    return next((place for place in usual if place.is_file()), None)


def _only_table(folder: Path) -> Path:
    every = (place for ending in _ENDINGS[:2] for place in folder.glob(f"*.{ending}"))
    found = sorted(filter(Path.is_file, every))
    if len(found) == 1:
        return found[0]
    there = f"; there are {quoted([place.name for place in found])}" if found else ""
    raise UserError(f"no file '{folder / 'train.csv'}'{there}: data.train_file=NAME, data.test_file=NAME")


def _read(
    file: Path, path_column: str | None, label_column: str | None, wanted: bool = True, needed: bool = True
) -> _Table:
    """The rows of a file; its labels are read if they are `wanted`, and must be there if `needed`."""
    there = RegularFiles(file.parent)
    try:
        with open_rows(file) as rows:
            notes: tuple[str, ...] = ()
            holding = [i for i, cell in enumerate(rows.columns) if _leads(there, cell)]
            if path_column is None and len(holding) == 1:
                rows = rows.without_names(_names(len(rows.columns), holding[0]))
                notes = (f"'{file.name}' names no columns: {quoted(rows.columns)} are taken",)
            columns, first = rows.columns, rows.first
            likely = [i for i, cell in enumerate(first) if i < len(columns) and _leads(there, cell)]
            only = likely[0] if len(likely) == 1 else None
            path = _column(file, columns, path_column, "path", _PATHS, likely=only)
            guessed = path is not None and columns[path].lower() not in _PATHS
            other = 1 - path if path is not None and len(columns) == 2 and guessed else None
            label = _column(file, columns, label_column, "label", _LABELS, needed, other) if wanted else None
            codes, labels = array("q"), dict[str, int]()
            every = chain([first] if first else [], rows.rest)
            paths = _paths(file, every, (path, label), codes, labels, there, rows.line)
            pictures = Files(file.parent, paths, None)
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read '{file}': it is not text in UTF-8; save it so ({error})") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read '{file}': {error}") from error
    if not len(pictures):
        raise UserError(f"'{file}' lists no pictures")
    notes += tuple(
        f"the {kind}s are in column '{columns[place]}' of '{file.name}'"
        for kind, place, given in (("path", path, path_column), ("label", label, label_column))
        if place is not None and given is None and columns[place] != kind
    )
    return _Table(file, pictures, None if label is None else np.array(codes), tuple(labels), notes)


def _column(
    file: Path,
    columns: list[str],
    given: str | None,
    kind: str,
    usual: Sequence[str],
    needed: bool = True,
    likely: int | None = None,
) -> int | None:
    """Place of a column by its name, a usual one or as is likely; None if not there and not needed."""
    if given in columns:
        return columns.index(given)
    lower = [name.lower() for name in columns]
    found = next((lower.index(name) for name in usual if name in lower), None)
    if given is None and found is not None:
        return found
    if not needed:
        return None
    if given is None and likely is not None:
        return likely
    missing = given or kind
    raise UserError(
        f"'{file}' has no column '{missing}'{nearest(missing, columns)}; there are {quoted(columns, 6)}: "
        f"data.{kind}_column=NAME"
    )


def _paths(
    file: Path,
    rows: Iterator[list[str]],
    places: tuple[int | None, int | None],
    codes: "array[int]",
    labels: dict[str, int],
    there: RegularFiles,
    start: int,
) -> Iterator[str]:
    """The pictures' paths row by row, while codes and labels are filled."""
    path_place, label_place = places
    assert path_place is not None
    needed = max(path_place, label_place or 0)
    for line, row in enumerate(filter(None, rows), start):
        path = row[path_place] if path_place < len(row) else ""
        label = "" if label_place is None or needed >= len(row) else row[label_place]
        if not path or (label_place is not None and not label):
            raise UserError(f"'{file}' has no {'label' if path else 'path'} in row {line}")
        yield path if path in there else _existing(file, line, there, path)
        if label_place is not None:
            if label[-2:] == ".0" and _WHOLE_NUMBER.fullmatch(label[:-2]):
                label = label[:-2]  # a whole number, as tables of numbers write it
            codes.append(labels.setdefault(label, len(labels)))


def _leads(there: RegularFiles, cell: str) -> bool:
    """Whether a cell is the path of a picture, with its ending or without."""
    turned = cell.strip().replace("\\", "/")
    return (
        turned in there or Path(turned).suffix.lower() in ENDINGS or _with_ending(there, turned) is not None
    )


def _with_ending(there: RegularFiles, path: str) -> str | None:
    """The file that a path without its ending means."""
    return next((path + ending for ending in ENDINGS if path and path + ending in there), None)


def _names(count: int, path: int) -> list[str]:
    """Names for columns that have none."""
    others = ["label"] if count == 2 else [f"column {i + 1}" for i in range(count) if i != path]
    return [*others[:path], "path", *others[path:]]


def _existing(file: Path, line: int, there: RegularFiles, path: str) -> str:
    """A path with its backslashes turned, if that leads to a file."""
    turned = path.replace("\\", "/")
    if turned in there:
        return turned
    if (found := _with_ending(there, turned)) is not None:
        return found
    if (file.parent / turned).exists():
        raise UserError(f"row {line} of '{file}' lists '{path}', which is not a regular file")
    raise UserError(f"'{file}' lists '{path}' in row {line}, which is not in '{file.parent}'")


def _index(tables: list[_Table], num_classes: int | None, first_label: int) -> tuple[tuple[str, ...], int]:
    """Gives the pictures their class indices; the classes' names if they have any, and their number."""
    labels = [label for table in tables for label in table.labels]
    if all(_WHOLE_NUMBER.fullmatch(label) for label in labels):
        highest = max((int(label) - first_label for label in labels), default=-1)
        count = num_classes or _counted(tables, highest)
        known = {label: int(label) - first_label for label in labels}
        known = {label: index for label, index in known.items() if 0 <= index < count}
        for table in tables:
            _number(table, known, f"outside {first_label} to {first_label + count - 1}")
        return (), count
    first = next(table for table in tables if table.labels)
    classes = tuple(sorted(first.labels))
    known = {name: index for index, name in enumerate(classes)}
    for table in tables:
        _number(table, known, f"no class of '{first.file.name}'")
    return classes, class_count(num_classes, classes)


def _counted(tables: list[_Table], highest: int) -> int:
    """The number of classes as the labels show it."""
    rows = sum(0 if table.codes is None else len(table.codes) for table in tables)
    if rows == 0:
        return class_count(None)
    # as many rows as there are, though the array is not made: what matters is the highest
    return class_count(None, labels={f"'{tables[0].file}'": np.full(rows, max(highest, 0), dtype=object)})


def _number(table: _Table, known: dict[str, int], otherwise: str) -> None:
    if table.codes is None:
        return
    for code, label in enumerate(table.labels):
        if label not in known:
            row = int(np.argmax(table.codes == code)) + 2
            raise UserError(f"label '{label[:40]}' in row {row} of '{table.file}' is {otherwise}")
    table.pictures.targets = np.array([known[label] for label in table.labels], np.int64)[table.codes]
