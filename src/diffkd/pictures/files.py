"""Picture files: where they are, read one by one, unreadable ones named and skipped or left out."""

import os
import warnings
from array import array
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffkd.errors import UserError
from diffkd.pictures.crops import RandomView
from diffkd.pictures.decoding import MAX_PIXELS, decode, header
from diffkd.pictures.memory import hold_out
from diffkd.pictures.twins import evenly, shared_pictures

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Item(NamedTuple):
    """A picture before it is decoded.

    Attributes:
        name: what an error calls it.
        picture: its file, the file's content, or the opened picture.
        target: class index; None without labels.
    """

    name: str
    picture: Path | bytes | Image.Image
    target: int | None


class Source(Protocol):
    """Where pictures come from. One that cannot be had raises UserError naming it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


class Texts:
    """Many texts in two blocks of memory: loader processes would copy a list of objects page by page.

    Args:
        texts: them.

    >>> Texts(["a.png", "b"])[1]
    'b'
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        text, ends = bytearray(), array("q")
        for each in texts:
            text += os.fsencode(each)
            ends.append(len(text))
        self.blocks = np.array(text, np.uint8), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self.blocks[1])

    def __getitem__(self, index: int) -> str:
        text, ends = self.blocks
        return os.fsdecode(text[ends[index - 1] if index else 0 : ends[index]].tobytes())


class Files:
    """Picture files beneath a folder.

    Args:
        folder: where the paths begin.
        paths: of the pictures, relative to the folder.
        targets: `(N,)` class index of each; None where there are no labels.
    """

    def __init__(self, folder: Path, paths: Iterable[str], targets: np.ndarray | None) -> None:
        self.folder, self.targets = folder, targets
        self._paths = Texts(paths)

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def paths(self) -> list[str]:
        """Paths of all pictures, relative to the folder."""
        return [self.path(index) for index in range(len(self))]

    def path(self, index: int) -> str:
        """Path of one picture, relative to the folder."""
        return self._paths[index]

    def __getitem__(self, index: int) -> Item:
        path = self.folder / self.path(index)
        return Item(str(path), path, None if self.targets is None else int(self.targets[index]))


class Part:
    """The samples of a source at some places.

    Args:
        source: all of them.
        places: `(N,)` int64.
    """

    def __init__(self, source: Source, places: np.ndarray) -> None:
        self.source, self.places = source, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Item:
        return self.source[int(self.places[index])]


def held_out(
    source: Source, targets: np.ndarray | None, fraction: float, where: str
) -> tuple[Part, Part, tuple[str, ...]]:
    """A part to train on, a part to test on as `hold_out` draws it, and a note that says so."""
    train, test = hold_out(len(source), fraction, targets)
    note = f"no test split in '{where}': {len(test)} of its {len(source)} pictures held out as one"
    return Part(source, train), Part(source, test), (note,)


class Pictures:
    """Map-style samples `(image (3, H, W) uint8, class index)`, or the image alone without labels.

    An unreadable picture is reported once. To train on, the next readable one takes its place, always
    the same; to test on, it is left out, so that no picture counts twice.

    Args:
        source: the pictures.
        transform: from an RGB picture to a tensor, or a random view.
        max_corrupt: how many unreadable ones are put up with.
        leave_out: an unreadable picture's sample is None.
        plain: as `transform`, but without augmentation, for a part held out; None is `transform`.
        levels, max_pixels: see `decode`.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], Tensor] | RandomView,
        max_corrupt: int = 0,
        *,
        plain: Callable[[Image.Image], Tensor] | None = None,
        leave_out: bool = False,
        levels: tuple[int, int] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.source, self.transform, self.plain = source, transform, plain
        self.max_corrupt, self.leave_out = max_corrupt, leave_out
        self.levels, self.max_pixels = levels, max_pixels
        # in shared memory, so that the loader's processes count together
        self._corrupt = torch.zeros(len(source), dtype=torch.bool)
        self._corrupt.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.source)

    def part(self, places: np.ndarray, *, training: bool) -> "Pictures":
        """The pictures at some places `(n,)`, augmented as these are, or held out and not."""
        transform = self.transform if training else self.plain or self.transform
        kept: Any = {"plain": self.plain, "leave_out": self.leave_out} if training else {"leave_out": True}
        return self._of(Part(self.source, places), transform, **kept)

    def whole(self) -> "Pictures":
        """All the pictures that these were held out of, seen as these are; themselves where they were not."""
        if not isinstance(self.source, Part):
            return self
        return self._of(self.source.source, self.transform, leave_out=self.leave_out)

    def unlabelled(self, source: Source) -> "Pictures":
        """Pictures of another source, augmented as these are."""
        return self._of(source, self.transform, plain=self.plain)

    def _of(
        self, source: Source, transform: Callable[[Image.Image], Tensor] | RandomView, **kept: Any
    ) -> "Pictures":
        """Pictures of a source, decoded as these are."""
        kept |= {"levels": self.levels, "max_pixels": self.max_pixels}
        return Pictures(source, transform, self.max_corrupt, **kept)

    def __getitem__(self, index: int) -> Any:
        """One sample.

        Raises:
            UserError: more than `max_corrupt` pictures cannot be read; the last one is named.
        """
        state = torch.get_rng_state()
        for place in (index,) if self.leave_out else (*range(index, len(self)), *range(index)):
            if self._corrupt[place]:
                continue
            try:
                return self.sample(place)
            except UserError as error:
                self._put_up_with(place, error)
                torch.set_rng_state(state)  # the next view is drawn as if that picture had never been there
        if self.leave_out and not self._corrupt.all():
            return None
        raise UserError("not one of the pictures can be read")

    def sample(self, place: int) -> Any:
        """The sample at a place; UserError where it cannot be read."""
        return self.seen(self.source[place])

    def seen(self, item: Item) -> Any:
        """The sample of a picture as these are seen; UserError where it cannot be read."""
        name, picture, target = item
        how: Any = {"levels": self.levels, "max_pixels": self.max_pixels}
        if isinstance(self.transform, RandomView):
            image = self.transform(picture, name, **how)
        else:
            image = self.transform(decode(picture, name, **how))
        return image if target is None else (image, target)

    def all(self) -> list[tuple[Any, int | None]]:
        """Every readable picture and its class index, in order; None without labels."""
        rows = [row for row in map(self.__getitem__, range(len(self))) if row is not None]
        return [row if isinstance(row, tuple) else (row, None) for row in rows]

    def picture(self, place: int) -> tuple[str, Path | bytes | Image.Image]:
        """What an error calls the picture at a place, and the picture, not decoded."""
        return self.source[place][:2]

    def unreadable(self, limit: int | None = None, *, decoded: bool = False) -> list[str]:
        """What is wrong with the pictures that cannot be read, a line each.

        Args:
            limit: so many are looked at, evenly spread; None looks at all.
            decoded: decodes them whole; else their headers are read.
        """
        found = []
        for place in range(len(self)) if limit is None else evenly(len(self), limit):
            try:
                name, picture = self.picture(place)
                if decoded:
                    decode(picture, name, levels=self.levels, max_pixels=self.max_pixels)
                else:
                    header(picture, name)
            except UserError as error:
                found.append(str(error))
        return found

    def _put_up_with(self, place: int, error: UserError) -> None:
        self._corrupt[place] = True
        count = int(self._corrupt.sum())
        if count > self.max_corrupt:
            raise UserError(
                f"{error}; mend or remove it, or skip such files: data.max_corrupt={count} or more"
            ) from error
        what = "left out" if self.leave_out else "skipped"
        warnings.warn(f"{error}; {what} ({count} of at most {self.max_corrupt})", stacklevel=2)


def shared_files(train: Source, test: Source | None) -> tuple[str, ...]:
    """A note where files to train on and to test on are the same; nothing of what is no file."""
    if not isinstance(train, Files | Part) or not isinstance(test, Files | Part):
        return ()
    return shared_pictures((len(train), partial(_file, train)), (len(test), partial(_file, test)))


def _file(source: Source, place: int) -> Path:
    picture = source[place].picture
    return picture if isinstance(picture, Path) else Path()
