"""Pictures that are to train on and to test on alike, whatever their names."""

import filecmp
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

_PEEK = 1 << 14  # bytes from the middle of a file that tell most files of one size apart


def shared_pictures(
    train: tuple[int, Callable[[int], Path]],
    test: tuple[int, Callable[[int], Path]],
    limits: tuple[int, int] = (5000, 1000),
) -> tuple[str, ...]:
    """A note where files to train on and to test on are the same, byte by byte, whatever their names.

    Args:
        train: how many files there are to train on, and the file of each.
        test: likewise to test on.
        limits: so many of each are looked at, evenly spread.
    """
    by_size: dict[int, list[Path]] = {}
    for path, size in _sizes(*train, limits[0]):
        by_size.setdefault(size, []).append(path)
    peeked: dict[int, dict[int, list[Path]]] = {}
    looked, pairs = 0, []
    for path, size in _sizes(*test, limits[1]):
        looked += 1
        if size not in by_size:
            continue
        if size not in peeked:  # of bitmaps, all have one size
            peeked[size] = {}
            for other in by_size[size]:
                peeked[size].setdefault(_peek(other, size), []).append(other)
        like = peeked[size].get(_peek(path, size), [])
        twin = next((other for other in like if filecmp.cmp(path, other, False)), None)
        if twin is not None:
            pairs.append((path, twin))
    if not pairs:
        return ()
    what = f"warning: {len(pairs)} of {looked} test pictures looked at are training pictures too"
    return (f"{what}, such as '{pairs[0][0]}' and '{pairs[0][1]}'",)


def _sizes(count: int, place: Callable[[int], Path], limit: int) -> Iterator[tuple[Path, int]]:
    """Some of the files and their sizes in bytes."""
    for index in evenly(count, limit):
        path = place(index)
        if path.is_file():
            yield path, path.stat().st_size


def _peek(path: Path, size: int) -> int:
    try:
        with path.open("rb") as file:
            file.seek(max((size - _PEEK) // 2, 0))
            return zlib.crc32(file.read(_PEEK))
    except OSError:  # it will be named where it is wanted
        return -1


def evenly(count: int, limit: int) -> list[int]:
    """So many of `count` places, evenly spread.

    >>> evenly(9, 3), evenly(2, 3)
    ([0, 4, 8], [0, 1])
    """
    return sorted({int(place) for place in np.linspace(0, count - 1, min(count, limit))})
