"""Lists of pictures in CSV files, one for each split."""

import csv
import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from diffkd.data.base import Data
from diffkd.errors import UserError, nearest
from diffkd.pictures.files import IMAGENET_MEAN, IMAGENET_STD, Files, PictureOptions, Source, held_out
from diffkd.pictures.options import class_count, data_folder, spread

_WHOLE_NUMBER = re.compile(r"-?[0-9]+")


class _Table(NamedTuple):
    """The rows of one file: paths relative to its folder, and labels unless they are not wanted."""

    file: Path
    paths: list[str]
    labels: list[str] | None


@spread(PictureOptions)
def build(
    root: str | None,
    *,
    path_column: str = "path",
    label_column: str = "label",
    val_fraction: float = 0.1,
    labels: Literal["given", "none"] = "given",
    num_classes: int | None = None,
    options: PictureOptions,
) -> Data:
    """A folder with `train.csv` and `test.csv` (or `val.csv`), each with a line of column names.

    Paths are relative to that folder, or absolute. Labels that are all whole numbers are class
    indices; others are names of classes, numbered in the order of the alphabet.

    Args:
        root: the folder.
        path_column: name of the column of paths.
        label_column: name of the column of labels; further columns are left alone.
        val_fraction: share of every class to test on where there is only `train.csv`.
        labels: "none" trains without labels; the test file keeps its labels if it has the column.
        num_classes: needed without labels; else checked, but may exceed the highest class index.
        options: how pictures are augmented.

    Raises:
        UserError: a file, column, picture or label is missing or wrong; it is named.
    """
    folder = data_folder(root, "table")
    tables = [_read(folder / "train.csv", path_column, None if labels == "none" else label_column)]
    place = next((file for file in (folder / "test.csv", folder / "val.csv") if file.is_file()), None)
    if place is not None:
        tables.append(_read(place, path_column, label_column, needed=labels == "given"))
    targets, classes, count = _index(tables, num_classes)
    splits = [Files(folder, table.paths, known) for table, known in zip(tables, targets, strict=True)]
    train: Source
    test: Source
    notes: tuple[str, ...] = ()
    if place is None:
        train, test, notes = held_out(splits[0], targets[0], val_fraction, str(folder))
    else:
        train, test = splits
    return Data(
        *options.splits(train, test),
        num_classes=count,
        image_shape=options.image_shape,
        view=options.view,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        class_names=classes,
        notes=notes,
    )


def _read(file: Path, path_column: str, label_column: str | None, needed: bool = True) -> _Table:
    """The rows of a file; its labels are read if there is a `label_column`, which may be `needed`."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except FileNotFoundError as error:
        raise UserError(f"no file '{file}'") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read '{file}': {error}") from error
    if label_column not in columns and not needed:
        label_column = None
    for column in filter(None, (path_column, label_column)):
        if column not in columns:
            raise UserError(f"'{file}' has no column '{column}'{nearest(column, columns)}")
        for line, row in enumerate(rows, 2):
            if not row[column]:
                raise UserError(f"'{file}' has no {column} in row {line}")
    if not rows:
        raise UserError(f"'{file}' lists no pictures")
    paths = [row[path_column] for row in rows]
    missing = next((path for path in paths if not (file.parent / path).exists()), None)
    if missing is not None:
        raise UserError(f"'{file}' lists '{missing}', which is not in '{file.parent}'")
    return _Table(file, paths, [row[label_column] for row in rows] if label_column else None)


def _index(
    tables: list[_Table], num_classes: int | None
) -> tuple[list[np.ndarray | None], tuple[str, ...], int]:
    """Class indices of each table, the classes' names if they have any, and their number."""
    labels = {label for table in tables for label in table.labels or ()}
    if all(_WHOLE_NUMBER.fullmatch(label) for label in labels):
        highest = max(map(int, labels), default=-1)
        found = max(highest + 1, 1) if labels else class_count(num_classes)
        count = num_classes or found
        known = {label: int(label) for label in labels if 0 <= int(label) < count}
        return [_look_up(table, known, f"outside 0 to {count - 1}") for table in tables], (), count
    first = next(table for table in tables if table.labels)
    classes = tuple(sorted(set(first.labels or ())))
    known = {name: index for index, name in enumerate(classes)}
    targets = [_look_up(table, known, f"no class of '{first.file.name}'") for table in tables]
    return targets, classes, class_count(num_classes, classes)


def _look_up(table: _Table, known: dict[str, int], otherwise: str) -> np.ndarray | None:
    if table.labels is None:
        return None
    for row, label in enumerate(table.labels, 2):
        if label not in known:
            raise UserError(f"label '{label}' in row {row} of '{table.file}' is {otherwise}")
    return np.array([known[label] for label in table.labels])
