"""Tables of text as other programs write them: whatever stands between the columns, named columns or not."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from diffkd.errors import UserError
from diffkd.pictures.decoding import regular_size

MARKS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16
_BETWEEN = ",;\t|"
_LOOKED_AT = 20  # lines


class Rows(NamedTuple):
    """A table under way.

    Attributes:
        columns: what its first row says.
        first: the row after that; empty where there is none.
        rest: those after it.
        line: number of `first` in the file.
    """

    columns: list[str]
    first: list[str]
    rest: Iterator[list[str]]
    line: int

    def without_names(self, names: Sequence[str]) -> "Rows":
        """The same where the first row names no columns, but is one of the others."""
        return Rows(
            list(names), self.columns, chain([self.first] if self.first else [], self.rest), self.line - 1
        )


def text_of(file: Path) -> str:
    """A file's text, in UTF-8 or, as its mark says, in UTF-16.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such text, or no regular file.
    """
    regular_size(file)
    content = file.read_bytes()
    marked = content[:2] in MARKS and len(content) > len(MARKS[0])
    return content.decode("utf-16" if marked else "utf-8-sig")


def check_text(file: Path) -> None:
    """Refuses what is no table in text.

    Raises:
        UserError: it is empty, or a spreadsheet, say.
    """
    with file.open("rb") as opened:
        start = opened.read(1024)
    what = None
    if not start.strip():
        what = "it is empty"
    elif start[:4] in (b"PK\3\4", b"\xd0\xcf\x11\xe0"):
        what = "it is a spreadsheet or an archive, no text: save it as CSV"
    elif b"\0" in start and start[:2] not in MARKS:
        what = "it holds zero bytes, as UTF-16 without its mark does: save it as UTF-8"
    elif start.lstrip()[:1] in (b"{", b"["):
        what = "it is JSON, not a table with columns: save it as CSV"
    if what is not None:
        raise UserError(f"cannot read '{file}': {what}")


@contextmanager
def open_rows(file: Path) -> Iterator[Rows]:
    """A file's rows; lines that begin with # before the first one are comments.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not text in UTF-8, nor in UTF-16 with its mark.
    """
    with file.open("rb") as start:
        encoding = "utf-16" if start.read(2) in MARKS else "utf-8-sig"
    with file.open(newline="", encoding=encoding) as lines:
        head = list(islice(lines, _LOOKED_AT))
        comments = next((i for i, line in enumerate(head) if line[:1] != "#"), len(head))
        head = head[comments:]
        rows = csv.reader(chain(head, lines), delimiter=between(head), skipinitialspace=True)
        columns = [name.strip() for name in next(rows, [])]
        first = next((row for row in rows if row), [])
        yield Rows(columns, first, rows, comments + 2)


def between(lines: Sequence[str]) -> str:
    """What stands between columns: what makes equally many of all lines, or is most often in the first.

    >>> between(["path;label, or so", "1.png;cat"]), between(["path,label", "1.png,cat"])
    (';', ',')
    """
    filled = [line for line in lines if line.strip()]
    counts: dict[str, set[int]] = {
        mark: {len(row) for row in csv.reader(filled, delimiter=mark) if row} for mark in (*_BETWEEN, " ")
    }
    even = [mark for mark, found in counts.items() if len(found) == 1 and max(found) > 1]
    if even:
        return max(even, key=lambda mark: (mark != " ", max(counts[mark])))
    return max(_BETWEEN, key=(filled or [""])[0].count)
