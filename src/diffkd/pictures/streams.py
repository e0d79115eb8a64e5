"""Pictures that come one after the other, from where nothing can be had at random."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar
from zlib import crc32

import numpy as np

from diffkd.errors import UserError
from diffkd.pictures.files import Files, Item, Pictures

T = TypeVar("T")
_LOOKED_AT = 32  # rows that tell whether a stream is still the same


class Stream(Protocol):
    """Where pictures come from, one after the other.

    Attributes:
        name: what an error calls it.
    """

    name: str

    def items(self, seed: int | None) -> Iterator[Item]:
        """The pictures, not decoded: in an order that depends on `seed` alone; None is their own order."""
        ...

    def first(self, count: int) -> "Stream":
        """The same of its first pictures, in its own order."""
        ...


class StreamedPictures:
    """Samples `(image, class index)` of a stream, as `diffkd.pictures.loading.Streamed` has them.

    Args:
        stream: the pictures.
        count: how many of them an epoch takes.
        like: pictures that are seen as these are to be.
    """

    def __init__(self, stream: Stream, count: int, like: Pictures) -> None:
        self.origin: Stream | None = stream
        self.name, self.count = stream.name, count
        self.like = like.unlabelled(Files(Path(), (), None))  # without the pictures themselves

    def __len__(self) -> int:
        return self.count

    def __getstate__(self) -> dict[str, Any]:
        """Loader processes are given the pictures: they need no stream of their own."""
        return self.__dict__ | {"origin": None}

    def stream(self, seed: int | None, start: int = 0) -> Iterator[Item]:
        """The pictures of an epoch from one on, not decoded; those before are read and left out.

        Raises:
            UserError: the stream is shorter than was said.
        """
        assert self.origin is not None
        found = 0
        for found, item in enumerate(islice(self.origin.items(seed), self.count), 1):
            if found > start:
                yield item
        if found < self.count:
            told = f"'{self.name}' ended after {found:,} of {self.count:,} rows"
            raise UserError(f"{told}: data.train_size={found}")

    def sample(self, row: Item) -> Any:
        """The sample of a row; UserError where it cannot be read."""
        return self.like.seen(row)

    def first(self, count: int) -> "StreamedPictures":
        """The same, of the first pictures alone."""
        assert self.origin is not None
        return StreamedPictures(self.origin.first(count), count, self.like)

    def fingerprint(self) -> str:
        """What tells this stream from others: its name, its length and its first rows."""
        checksum = 0
        for item in islice(self.stream(None), min(self.count, _LOOKED_AT)):
            content = item.picture if isinstance(item.picture, bytes) else str(item.picture).encode()
            checksum = crc32(content + str(item.target).encode(), checksum)
        return f"{self.name} {self.count} {checksum}"


def interleaved(parts: Iterable[Iterable[T]], random: np.random.Generator, most: int = 8) -> Iterator[T]:
    """What is in several parts, the next one out of a part that is drawn; so many are under way at once.

    >>> sorted(interleaved([[1, 2], [3], [4, 5]], np.random.default_rng(0)))
    [1, 2, 3, 4, 5]
    """
    waiting = iter(parts)
    active = [iter(part) for part in islice(waiting, most)]
    while active:
        place = int(random.integers(len(active)))
        try:
            yield next(active[place])
        except StopIteration:
            active[place : place + 1] = [iter(part) for part in islice(waiting, 1)]


def drawn(items: Iterable[T], buffer: int, random: np.random.Generator) -> Iterator[T]:
    """Items in another order: each is drawn among `buffer` ones that are held.

    >>> sorted(drawn(range(5), 3, np.random.default_rng(0)))
    [0, 1, 2, 3, 4]
    """
    held: list[T] = []
    for item in items:
        if len(held) < buffer:
            held.append(item)
            continue
        place = int(random.integers(buffer))
        yield held[place]
        held[place] = item
    yield from (held[place] for place in random.permutation(len(held)))


class Held:
    """Pictures of a stream held in memory as they are stored, one block of bytes: a source like any other.

    Args:
        name: what an error calls them.
        items: the pictures.

    Attributes:
        content: all their bytes.
        targets: `(N,)` class index of each; None where there are none.
    """

    def __init__(self, name: str, items: Iterator[Item]) -> None:
        content, ends, targets = bytearray(), [0], []
        for item in items:
            content += item.picture if isinstance(item.picture, bytes) else read(item)
            ends.append(len(content))
            targets.append(item.target)
        self.name, self.content = name, np.frombuffer(content, np.uint8)
        self._ends = np.array(ends, np.int64)
        self.targets = None if None in targets else np.array(targets, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Item:
        content = self.content[self._ends[index] : self._ends[index + 1]].tobytes()
        return Item(
            f"{self.name} {index}", content, None if self.targets is None else int(self.targets[index])
        )


def read(item: Item) -> bytes:
    """The content of a picture's file.

    Raises:
        UserError: it cannot be read.
    """
    assert isinstance(item.picture, Path)
    try:
        return item.picture.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read picture '{item.name}': {error.strerror}") from error
