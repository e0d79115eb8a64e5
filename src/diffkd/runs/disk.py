"""Files written so that nobody reads half of one, and the disk's troubles in words."""

import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffkd.errors import UserError

_LEAST_ROOM = 2**16  # bytes free under which a disk counts as full


def write_atomically(place: Path, write: Callable[[Path], object]) -> None:
    """Writes beside the place, syncs, renames: the place holds the old content or the new.

    The name beside it is this process's own, so that two that write one place do not meet.

    Raises:
        UserError: a writer that knows no errors of the system could not write: the disk is full, say.
    """
    partial = place.with_name(f"{place.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask has it; some writers let nobody else read
        write(partial)
        partial.chmod(mode)
        settle(partial, place)
    except OSError as error:
        error.filename = str(place)  # not the one beside it, or none
        raise
    except Exception as error:
        if not is_full(place, error):
            raise
        raise UserError(f"'{place}': no space left on the disk ({reason_of(error)})") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def saying_where(place: Path) -> Iterator[None]:
    """Turns an operating system's error into one line that names the place."""
    try:
        yield
    except OSError as error:
        raise UserError(f"'{place}': {reason_of(error)}") from error


def free_space(place: Path) -> int:
    """Bytes free where `place` is, or would be."""
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def settle(partial: Path, final: Path) -> None:
    """Syncs a file and gives it its final name."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found = zlib.crc32(chunk, found)
    return found


def cell(value: Any) -> Any:
    """A value as a table's cell: before a name that a spreadsheet would run as a formula, an apostrophe.

    >>> cell("=cmd()"), cell("cat"), cell("-1"), cell(0.5)
    ("'=cmd()", 'cat', '-1', 0.5)
    """
    if not isinstance(value, str) or value[:1] not in tuple("=+-@\t\r"):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def first_line(place: Path) -> str:
    """The first line of a file; empty where there is none."""
    try:
        return (place.read_text().splitlines() or [""])[0]
    except (OSError, ValueError):
        return ""


def read_whole(place: Path) -> bytes:
    """A file's content.

    Raises:
        UserError: it cannot be read, or is none (a pipe, say, would be waited for).
    """
    with saying_where(place):
        if place.exists() and not place.is_file():
            raise UserError(f"'{place}' is not a file")
        return place.read_bytes()


def read_json(place: Path) -> dict[str, Any]:
    """A mapping from a JSON file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(read_whole(place))
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{place}' is damaged: {reason_of(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"'{place}' is damaged: it is no mapping")
    return found


def reason_of(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_full(place: Path, error: Exception) -> bool:
    """Whether a writer's own error means a full disk, or one that cannot be written."""
    words = ("no space", "os error 28", "unexpected pos", "write failed", "failed writing", "i/o error")
    return any(word in str(error).lower() for word in words) or free_space(place) < _LEAST_ROOM
