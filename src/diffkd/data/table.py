"""Lists of pictures in CSV files, one for each split."""

import csv
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from diffkd.data.base import Data
from diffkd.errors import UserError, nearest
from diffkd.options import class_count, data_folder, quoted, spread
from diffkd.picture_files import IMAGENET_MEAN, IMAGENET_STD, Files, PictureOptions


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
        path_column, label_column: names of the two columns; others are left alone.
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
    notes: tuple[str, ...] = ()
    if place is None:
        *splits, note = splits[0].hold_out(val_fraction)
        notes = (note,)
    return Data(
        *options.splits(*splits),
        num_classes=count,
        image_shape=options.image_shape,
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
    labelled = [table for table in tables if table.labels]
    every = [label for table in labelled for label in table.labels or ()]
    if all(re.fullmatch(r"-?\d+", label) for label in every):
        classes: tuple[str, ...] = ()
        highest = max(map(int, every), default=-1)
        count = num_classes or (highest + 1 if every else class_count(None, (), str(tables[0].file)))
        known = {str(i): i for i in range(count)}
    ...
