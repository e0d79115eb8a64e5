"""Every mask read once: its size, and how many pixels of it hold which code; kept for the next run."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from diffkd.errors import UserError
from diffkd.pictures.decoding import header
from diffkd.pictures.kept import Kept
from diffkd.pictures.progress import watched
from diffkd.pictures.tables import Counts

_SMALL = 1 << 16  # codes below are counted by bincount
_WORTH = 1.0  # seconds of reading that are worth a file in the cache
_SIGNS = 4  # numbers that tell whether a picture and its mask are still the same


class Masked(Protocol):
    """Pictures and the codes of their masks.

    Attributes:
        reads: how codes are read from the files, where there are several ways.
        notes: what was found besides, one line each.
    """

    reads: str
    notes: tuple[str, ...]

    def __len__(self) -> int: ...

    def picture(self, index: int) -> Path:
        """The picture's file."""
        ...

    def place(self, index: int) -> str:
        """What an error calls the mask."""
        ...

    def file(self, index: int) -> Path:
        """The file that holds the mask, perhaps others' too."""
        ...

    def codes(self, index: int) -> np.ndarray:
        """What the mask holds, `(H, W)` int64: see `ClassTable`."""
        ...


class Count(NamedTuple):
    """What is in a mask.

    Attributes:
        pixels: by code.
        size: `(H, W)`.
    """

    pixels: Counts
    size: tuple[int, int]


def count(source: Masked, strict: bool = True) -> list[Count]:
    """Counts every mask, and compares its size with that of its picture.

    What took a while is kept: a mask is read again where it or its picture has changed in size or time.

    Args:
        source: pictures and masks.
        strict: refuses a picture that has no readable header; else its size is not compared.

    Raises:
        UserError: a mask cannot be read, or its size is not its picture's.
    """
    places = [(source.picture(i), source.file(i)) for i in range(len(source))]
    kept = Kept("masks", (source.reads, *(str(path) for pair in places for path in pair)))
    signs = np.array([[*_sign(picture), *_sign(mask)] for picture, mask in places], np.int64)
    signs = signs.reshape(-1, _SIGNS)
    known = _unpacked(kept.load(), signs)
    new, begin = [i for i, found in enumerate(known) if found is None], time.perf_counter()
    for i, found in zip(new, _read(source, new, strict), strict=True):
        known[i] = found
    counts = [found for found in known if found is not None]
    if time.perf_counter() - begin > _WORTH:
        kept.save(_packed(counts, signs))
    return counts


def _read(source: Masked, places: Sequence[int], strict: bool) -> Iterator[Count]:
    look: Callable[[int], Count] = lambda index: _count_one(source, index, strict)  # noqa: E731
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            yield from watched(pool.map(look, places), len(places), "reading masks")
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the first mistake ends it
            raise


def _count_one(source: Masked, index: int, strict: bool) -> Count:
    codes = source.codes(index)
    picture, size = source.picture(index), (codes.shape[0], codes.shape[1])
    try:
        found = header(picture, str(picture))[:2]
    except UserError:
        if strict:
            raise
        found = size  # it will be skipped where it is wanted
    if found != size:
        ours, theirs = (f"{height}x{width}" for height, width in (found, size))
        raise UserError(f"'{picture}' has {ours} pixels, its mask '{source.place(index)}' {theirs}")
    if codes.max(initial=0) < _SMALL:
        numbers = np.bincount(codes.ravel())
        values = np.flatnonzero(numbers)
        numbers = numbers[values]
    else:
        values, numbers = np.unique(codes, return_counts=True)
    return Count(dict(zip(values.tolist(), numbers.tolist(), strict=True)), size)


def _sign(path: Path) -> tuple[int, int]:
    """Size and time of a file; what cannot be looked at has no sign, and is read."""
    try:
        told = path.stat()
    except OSError:
        return -1, time.time_ns()
    return told.st_size, told.st_mtime_ns


def _packed(counts: Sequence[Count], signs: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "signs": signs,
        "sizes": np.array([found.size for found in counts], np.int64),
        "lengths": np.array([len(found.pixels) for found in counts], np.int64),
        "codes": np.array([code for found in counts for code in found.pixels], np.int64),
        "pixels": np.array([n for found in counts for n in found.pixels.values()], np.int64),
    }


def _unpacked(kept: dict[str, np.ndarray], signs: np.ndarray) -> list[Count | None]:
    """What is kept of files that are still the same."""
    known: list[Count | None] = [None] * len(signs)
    if kept.keys() != {"signs", "sizes", "lengths", "codes", "pixels"} or kept["signs"].shape != signs.shape:
        return known
    codes, pixels = kept["codes"].tolist(), kept["pixels"].tolist()
    same = (kept["signs"] == signs).all(1).tolist()
    end = 0
    for i, length in enumerate(kept["lengths"].tolist()):
        start, end = end, end + length
        if same[i]:
            height, width = kept["sizes"][i].tolist()
            pairs = zip(codes[start:end], pixels[start:end], strict=True)
            known[i] = Count(dict(pairs), (height, width))
    return known
