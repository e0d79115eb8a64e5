"""The teachers that are kept in the cache, and runs: what there is, and its removal."""

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from diffkd.errors import UserError
from diffkd.pictures.kept import cache_folder
from diffkd.runs.places import users, uses_file

_UNITS = {"h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class Kept:
    """A made teacher in the cache, or a run.

    Attributes:
        path: its folder.
        size: bytes.
        age: seconds since it was last written to.
        locked: another process is writing it.
        users: runs that learn from it.
    """

    path: Path
    size: int
    age: float
    locked: bool
    users: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """A teacher's name, or a run's path."""
        return self.path.name if self.path.parent == cache_folder() / "teachers" else str(self.path)

    def __str__(self) -> str:
        days, state = self.age / _UNITS["d"], ", in use" if self.locked else ""
        needed = f", needed by {', '.join(map(str, self.users))}" if self.users else ""
        return f"{self.name}: {self.size / 1e6:.1f} MB, {days:.1f} days old{state}{needed}"


@dataclass(frozen=True)
class Wanted:
    """What `diffkd clean` is asked for.

    Attributes:
        remove: the teachers, or nothing: they are listed only.
        older: seconds since they were written.
        sure: nobody is asked.
    """

    remove: bool = False
    older: float = 0.0
    sure: bool = False

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Wanted":
        """From a command line's words.

        Raises:
            UserError: a word is not understood.

        >>> Wanted.parse(["teachers", "older=30d"])
        Wanted(remove=True, older=2592000.0, sure=False)
        """
        remove, older, sure = False, 0.0, False
        for word in words:
            key, _, value = word.partition("=")
            match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", value)
            if word == "teachers":
                remove = True
            elif key == "older" and match:
                older = float(match[1]) * _UNITS[match[2]]
            elif word in ("yes=true", "yes=false"):
                sure = value == "true"
            else:
                raise UserError(f"clean takes: teachers older=30d yes=true (h, d or w), not '{word}'")
        return cls(remove, older, sure)


def kept_teachers(older: float = 0.0) -> list[Kept]:
    """The made teachers that are at least `older` seconds old, the oldest first."""
    found = [_look(place) for place in (cache_folder() / "teachers").glob("*/") if place.is_dir()]
    return sorted((kept for kept in found if kept.age >= older), key=lambda kept: -kept.age)


def told(kept: Sequence[Kept], what: str) -> str:
    """How many there are and how large they are together.

    >>> told([], "teachers")
    '0 teachers, 0.0 MB'
    """
    return f"{len(kept)} {what}, {sum(one.size for one in kept) / 1e6:.1f} MB"


def found_runs(folder: str = "runs") -> list[Kept]:
    """The runs beneath a folder, the oldest first; whoever wants one gone removes its folder."""
    places = [place.parent for place in Path(folder).glob("**/recipe.yaml") if _is_run(place.parent)]
    return sorted((_look(place) for place in places), key=lambda kept: -kept.age)


def _is_run(place: Path) -> bool:
    return (place / "checkpoints").is_dir() or (place / "summary.json").is_file()


def remove(teachers: Sequence[Kept]) -> Iterator[str]:
    """Removes teachers that nobody is writing and no run needs; a line for each."""
    for kept in teachers:
        if kept.users:
            yield f"{kept.name}: needed by {kept.users[0]}, left"
            continue
        with ExitStack() as held:
            if not _taken(kept.path, held):
                yield f"{kept.path.name}: in use, left"
                continue
            shutil.rmtree(kept.path, ignore_errors=True)
            yield f"{kept.path.name}: " + ("cannot be removed" if kept.path.exists() else "removed")
        if not kept.path.exists():
            _beside(kept.path).unlink(missing_ok=True)
            uses_file(kept.path).unlink(missing_ok=True)


def _look(place: Path) -> Kept:
    files = [path.stat() for path in place.rglob("*") if path.is_file()]
    newest = max([place.stat().st_mtime, *(file.st_mtime for file in files if file.st_size)])
    with ExitStack() as held:
        free = _taken(place, held)
    size, age = sum(file.st_size for file in files), max(time.time() - newest, 0.0)
    return Kept(place, size, age, not free, tuple(users(place)))


def _beside(place: Path) -> Path:
    return place.with_name(f"{place.name}.lock")


def _taken(place: Path, held: ExitStack) -> bool:
    """Takes the locks of a teacher that its makers hold, where they are there and free."""
    for lock in (_beside(place), place / ".lock"):
        if lock.is_file():
            try:
                held.enter_context(FileLock(lock, timeout=0))
            except Timeout:
                return False
    return True
