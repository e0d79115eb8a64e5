"""Folders walked once, and an account of what in them is no picture."""

import os
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from diffkd.errors import UserError
from diffkd.pictures.decoding import ENDINGS, HEIC, reads_heic

# what operating systems and file servers put beside one's own folders
SYSTEM = {"__MACOSX", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "@Recycle", "#recycle"}
SYSTEM |= {"__pycache__", "#snapshot", "lost+found", "Thumbs.db", "desktop.ini", "ehthumbs.db"}


class Scan:
    """Finds pictures beneath a folder; every real folder is entered once, whatever links lead to it.

    Args:
        folder: never left upwards, even by links.

    Attributes:
        left_out: what was passed by, by kind, with its number.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     _ = Path(place, "a.png").touch(), Path(place, "b.raw").touch()
    ...     scan = Scan(Path(place))
    ...     scan.pictures(), dict(scan.left_out)
    (['a.png'], {'.raw files': 1})
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left_out: Counter[str] = Counter()
        self._real = real = folder.resolve()
        self._entered = {_identity(place.stat()): "." for place in (real, *real.parents)}

    def folders(self) -> list[str]:
        """Names of the folders directly in it, in the order of their names.

        Raises:
            UserError: one is a link to nowhere, or two are the same folder.
        """
        names = []
        for entry in sorted(self._entries(""), key=lambda entry: entry.name):
            if entry.is_symlink() and not Path(entry.path).exists():
                raise UserError(f"'{entry.path}' is a link to nowhere; mend or remove it")
            if not entry.is_dir():
                continue
            first = self._entered.setdefault(_identity(entry.stat()), entry.name)
            if first != entry.name:
                what = f"'{first}'" if first != "." else "a folder around them"
                raise UserError(f"'{entry.path}' is the same folder as {what}; remove one of the two")
            names.append(entry.name)
        return names

    def pictures(self, inside: str = "") -> list[str]:
        """Paths of the pictures beneath a folder in it, relative to that, in the order of their names.

        Raises:
            UserError: a folder cannot be read.
        """
        found: list[str] = []
        waiting = [""]
        while waiting:
            start = waiting.pop()
            for entry in self._entries(f"{inside}/{start}"):
                path = start + entry.name
                if entry.is_dir():
                    if self._enters(entry):
                        waiting.append(path + "/")
                elif reason := _unfit(entry):
                    self.left_out[reason] += 1
                else:
                    found.append(path)
        return sorted(found)

    def _entries(self, inside: str) -> Iterable[os.DirEntry[str]]:
        place = self.folder / inside.strip("/")
        try:
            with os.scandir(place) as entries:
                found = list(entries)
        except OSError as error:
            raise UserError(f"cannot read the folder '{place}': {error.strerror}") from error
        for entry in found:
            if (name := entry.name) in SYSTEM:
                self.left_out["of the system"] += 1
            elif name[0] != ".":
                yield entry

    def _enters(self, entry: os.DirEntry[str]) -> bool:
        """Whether a folder is to be read here: it is no link to what is read anyway, and new."""
        identity = _identity(entry.stat())
        inside = entry.is_symlink() and Path(os.path.realpath(entry.path)).is_relative_to(self._real)
        if inside or identity in self._entered:
            self.left_out["links to folders that are read elsewhere"] += 1
            return False
        self._entered[identity] = entry.name
        return True

    def notes(self) -> tuple[str, ...]:
        """One line on what was left out, if anything was."""
        if not self.left_out:
            return ()
        shown = ", ".join(f"{count:,} {what}" for what, count in self.left_out.most_common(6))
        more = len(self.left_out) - 6
        return (f"left out in '{self.folder}': {shown}" + (f" and {more} further kinds" if more > 0 else ""),)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _unfit(entry: os.DirEntry[str]) -> str | None:
    """Why an entry that is no folder is no picture file; None if it may be one."""
    _, dot, ending = entry.name.rpartition(".")
    if (ending := f"{dot}{ending}".lower() if dot else "") not in ENDINGS:
        if ending not in HEIC:
            return f"{ending} files" if dot else "files without an ending"
        if not reads_heic():
            return f"{ending} files (pip install pillow-heif reads them)"
    if entry.is_file():
        return None
    return "not regular files" if Path(entry.path).exists() else "links to nowhere"


class RegularFiles:
    """Answers which paths lead to regular files; every folder is listed once.

    Args:
        folder: where relative paths begin.

    >>> "nowhere.png" in RegularFiles(Path("."))
    False
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: dict[str, array[int]] = {}

    def __contains__(self, path: str) -> bool:
        where, _, name = path.rpartition("/")
        if path[:1] == "/":
            where = where or "/"
        names = self._names.get(where)
        if names is None:
            names = self._names[where] = self._list(where)
        key = hash(name)
        place = bisect_left(names, key)
        return place < len(names) and names[place] == key

    def _list(self, where: str) -> "array[int]":
        """Hashes of the names, in rising order: a tenth of the memory of a set, of a million files say."""
        try:
            with os.scandir(self.folder / where) as entries:
                return array("q", sorted(hash(entry.name) for entry in entries if entry.is_file()))
        except (OSError, ValueError):
            return array("q")
