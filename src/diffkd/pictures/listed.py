"""Lists of pictures in tables of text: which columns hold what, and where the files are."""

import csv
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from diffkd.errors import UserError, nearest
from diffkd.pictures.decoding import ENDINGS
from diffkd.pictures.files import Files
from diffkd.pictures.options import quoted
from diffkd.pictures.rows import Rows, check_text, open_rows
from diffkd.pictures.scan import RegularFiles
from diffkd.pictures.splits import inside

_PATHS = ("path", "filename", "file_name", "file", "filepath", "file_path", "image", "image_path", "img")
_LABELS = ("label", "class", "class_name", "category", "target", "labels", "y")
_NO_LABEL = ("", "nan")
_SPLITS = ("split", "subset", "set", "partition")

Labels = Literal["needed", "if there", "if named", "ignored"]


class PictureList(NamedTuple):
    """The rows of one file, in few blocks of memory.

    Attributes:
        file: it.
        pictures: the files that it lists.
        codes: `(N,)` places in `labels`; None where labels are not wanted.
        labels: the different labels, in the order of their first rows.
        splits: `(N,)` lower-case names of each row's split, where a column says it.
        notes: columns that had to be found, paths that had to be changed.
    """

    file: Path
    pictures: Files
    codes: np.ndarray | None
    labels: tuple[str, ...]
    splits: np.ndarray | None
    notes: tuple[str, ...]

    def part(self, names: Sequence[str]) -> "PictureList":
        """The rows of some splits."""
        assert self.splits is not None
        places = np.flatnonzero(np.isin(self.splits, names))
        paths = (self.pictures.path(int(place)) for place in places)
        codes = None if self.codes is None else self.codes[places]
        return self._replace(pictures=Files(self.pictures.folder, paths, None), codes=codes, splits=None)


def read_list(
    file: Path, path_column: str | None, label_column: str | None, labels: Labels = "needed"
) -> PictureList:
    """The rows of a file.

    Args:
        file: it.
        path_column: name of the column of paths; None finds it.
        label_column: likewise of that of labels.
        labels: whether they must be there; "if named" takes no column whose name does not say it.

    Raises:
        UserError: the file cannot be read, or a column, a picture or a label is missing.
    """
    there = Places(file.parent)
    try:
        check_text(file)
        with open_rows(file) as rows:
            notes: tuple[str, ...] = ()
            place = there.leading(rows.columns) if path_column is None else None
            if place is not None:
                rows = rows.without_names(_names(len(rows.columns), place))
                notes = (f"'{file.name}' names no columns: {quoted(rows.columns)} are taken",)
            asked = (path_column, label_column)
            columns = _columns(file, rows, there, asked, labels)
            read = _Read(file, there, columns)
            pictures = Files(file.parent, read.paths(rows), None)
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read '{file}': it is not text in UTF-8; save it so ({error})") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read '{file}': {error}") from error
    if not len(pictures):
        raise UserError(f"'{file}' lists no pictures")
    notes += tuple(_found(file, rows.columns, columns, asked)) + tuple(there.notes)
    codes = None if columns.label is None else np.array(read.codes)
    splits = None if columns.split is None else np.array(list(read.splits))[np.array(read.parts)]
    return PictureList(file, pictures, codes, tuple(read.labels), splits, notes + read.doubles())


class _Columns(NamedTuple):
    """Places of the columns that count."""

    path: int
    label: int | None
    split: int | None


def _columns(
    file: Path,
    rows: Rows,
    there: "Places",
    asked: tuple[str | None, str | None],
    labels: Labels,
) -> _Columns:
    names, first = rows.columns, rows.first
    path = _column(file, names, asked[0], "path", _PATHS, likely=there.leading(first[: len(names)]))
    assert path is not None
    guessed = names[path].lower() not in _PATHS
    other = 1 - path if len(names) == 2 and guessed and labels != "if named" else None
    needed, wanted = labels == "needed", labels != "ignored"
    label = _column(file, names, asked[1], "label", _LABELS, needed, other) if wanted else None
    split = next(
        (i for i, name in enumerate(names) if name.lower() in _SPLITS and i not in (path, label)), None
    )
    return _Columns(path, label, split)


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
    if given is None and likely is not None:
        return likely
    if not needed:
        return None
    missing = given or kind
    raise UserError(
        f"'{file}' has no column '{missing}'{nearest(missing, columns)}; there are {quoted(columns, 6)}: "
        f"data.{kind}_column=NAME"
    )


def _names(count: int, path: int) -> list[str]:
    """Names for columns that have none."""
    others = ["label"] if count == 2 else [f"column {i + 1}" for i in range(count) if i != path]
    return [*others[:path], "path", *others[path:]]


def _found(
    file: Path, names: list[str], columns: _Columns, asked: tuple[str | None, str | None]
) -> Iterator[str]:
    """Which columns were taken, where nobody said it or they are called otherwise, and which were not."""
    for kind, place, given in (("path", columns.path, asked[0]), ("label", columns.label, asked[1])):
        if place is not None and given is None and names[place] != kind:
            yield f"the {kind}s are in column '{names[place]}' of '{file.name}'"
    unused = [name for i, name in enumerate(names) if i not in columns and name]
    if unused and columns.label is not None:
        yield f"of '{file.name}', {quoted(unused)} {'are' if len(unused) > 1 else 'is'} not used"


class _Read:
    """Reads rows, and keeps what they say but for their paths.

    Attributes:
        codes: of every row, the place of its label in `labels`.
        parts: likewise, of its split in `splits`.
    """

    def __init__(self, file: Path, there: "Places", columns: _Columns) -> None:
        self.file, self.there, self.columns = file, there, columns
        self.codes, self.labels = array("q"), dict[str, int]()
        self.parts, self.splits = array("q"), dict[str, int]()
        self._keys = array("q")

    def paths(self, rows: Rows) -> Iterator[str]:
        """The pictures' paths, row by row."""
        path_place, label_place, split_place = self.columns
        needed = max(place for place in self.columns if place is not None)
        every = chain([rows.first] if rows.first else [], rows.rest)
        width = len(rows.columns)
        for line, row in enumerate(filter(None, every), rows.line):
            whole = needed < len(row)
            self._check(line, row, width)
            path = row[path_place] if path_place < len(row) else ""
            label = row[label_place].strip() if whole and label_place is not None else ""
            if not path or (label_place is not None and label.lower() in _NO_LABEL):
                if not any(map(str.strip, row)):
                    continue
                raise UserError(f"'{self.file}' has no {'label' if path else 'path'} in row {line}")
            found = self.there.find(path) or self._missing(line, path)
            self._keys.append(hash(found))
            yield found
            if label_place is not None:
                self.codes.append(self.labels.setdefault(_whole(label), len(self.labels)))
            if split_place is not None:
                split = row[split_place].strip().lower() if whole else ""
                self.parts.append(self.splits.setdefault(split, len(self.splits)))

    def _check(self, line: int, row: list[str], width: int) -> None:
        """Refuses a row that is read otherwise than it was meant."""
        if any("\n" in cell for cell in row):
            raise UserError(
                f"row {line} of '{self.file}' goes over several lines: a quotation mark in it is not closed"
            )
        if any(map(str.strip, row[width:])):
            raise UserError(
                f"row {line} of '{self.file}' has {len(row)} fields for {width} columns: put texts with the "
                "mark that separates columns in quotation marks"
            )

    def _missing(self, line: int, path: str) -> str:
        if (self.file.parent / path.replace("\\", "/")).exists():
            raise UserError(f"row {line} of '{self.file}' lists '{path}', which is not a regular file")
        raise UserError(f"'{self.file}' lists '{path}' in row {line}, which is not in '{self.file.parent}'")

    def doubles(self) -> tuple[str, ...]:
        """A note on pictures that are listed more than once."""
        keys = np.array(self._keys)
        again = len(keys) - len(np.unique(keys))
        if not again:
            return ()
        pairs = np.stack([keys, np.array(self.codes)], 1) if self.codes else keys[:, None]
        torn = len(np.unique(pairs, axis=0)) - len(np.unique(keys))
        note = f"{again} rows of '{self.file.name}' list a picture that another row lists"
        return (note + (f", {torn} with another label" if torn else ""),)


def _whole(label: str) -> str:
    """A label that is a whole number without what tables of numbers write behind it."""
    return label[:-2] if label[-2:] == ".0" and label[:-2].removeprefix("-").isdecimal() else label


class Places:
    r"""Finds the files of a list whose paths begin in its folder, in one beside it, or on another machine.

    What paths lack, or have before what is there, is found with the first of them and holds for all.

    Args:
        folder: of the list.

    Attributes:
        notes: how paths were changed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     Path(place, "img").mkdir()
    ...     _ = Path(place, "img", "a.png").touch()
    ...     places = Places(Path(place))
    ...     places.find("C:\\data\\img\\a.png"), places.find("img/a"), places.find("b.png")
    ('img/a.png', 'img/a.png', None)
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder, list[str]()
        self._there = RegularFiles(folder)
        self._cut, self._put = "", ""
        self._settled = False

    def find(self, path: str) -> str | None:
        """The file that a path means, relative to the folder; None where there is none."""
        if path not in self._there:
            path = path.strip().replace("\\", "/")
            moved = self._put + path.removeprefix(self._cut) if path.startswith(self._cut) else path
            found = self._named(moved) or self._named(path)
            if found is None and not self._settled:
                found = self._elsewhere(path)
            if found is None:
                return None
            path = found
        self._settled = True
        return path

    def leading(self, cells: Sequence[str]) -> int | None:
        """Which one of a table's cells is the path of a picture; None where none is, or several are.

        An ending says it; without one the file must be there.
        """
        ending = [i for i, cell in enumerate(cells) if Path(cell.strip()).suffix.lower() in ENDINGS]
        found = ending or [i for i, cell in enumerate(cells) if self._probe().find(cell) is not None]
        return found[0] if len(found) == 1 else None

    def _probe(self) -> "Places":
        """One that looks in its place: a label that is called as a file is settles nothing."""
        probe = Places(self.folder)
        probe._there = self._there
        return probe

    def _named(self, path: str) -> str | None:
        """The file of that name, or of that name and an ending."""
        if not path or path in self._there:
            return path or None
        return next((path + ending for ending in ENDINGS if path + ending in self._there), None)

    def _elsewhere(self, path: str) -> str | None:
        """The file in one of the folder's folders, or where only the end of the path is right."""
        for name in inside(self.folder):
            if (found := self._named(f"{name}/{path}")) is not None:
                self._put = f"{name}/"
                self.notes.append(f"paths begin in '{self.folder / name}'")
                return found
        parts = path.split("/")
        for i in range(1, len(parts)):
            if (found := self._named("/".join(parts[i:]))) is not None:
                self._cut = "/".join(parts[:i]) + "/"
                self.notes.append(f"paths of another place: '{self._cut}' before them is left out")
                return found
        return None
