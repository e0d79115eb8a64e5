"""What a few of a set's pictures tell of all of them: their size, and how 16-bit ones become 8-bit."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffkd.errors import UserError
from diffkd.pictures.decoding import ENDINGS, Header, deep_values, frames, header, used_colours
from diffkd.pictures.files import Item, Source
from diffkd.pictures.twins import evenly

_LOOKED_AT = 64  # pictures whose headers are read
_READ = 2000  # 16-bit pictures that are read whole
_FULL = (0, 65535)


class Looked(NamedTuple):
    """What was found.

    Attributes:
        size: `(H, W)` that all have; None where they differ.
        typical: medians of their heights and widths.
        levels: values of 16-bit pictures that become black and white; None where each has its own.
        notes: on 16-bit pictures, one line.
    """

    size: tuple[int, int] | None
    typical: tuple[int, int] | None
    levels: tuple[int, int] | None
    notes: tuple[str, ...]


class Placed:
    """Picture files by their places, as a source of pictures.

    Args:
        count: how many there are.
        place: the file of each.
    """

    def __init__(self, count: int, place: Callable[[int], Path]) -> None:
        self.count, self.place = count, place

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        place = self.place(index)
        return Item(str(place), place, None)


def look_over(train: Source, test: Source) -> Looked:
    """Looks at some pictures of both splits, evenly spread; what cannot be read is passed by.

    16-bit pictures that do not say their depth are scaled alike where most to train on are such: by the
    least and the largest value in these, or as 16 bits where they use half of them. A few among 8-bit ones
    are each scaled by their own depth, as `decode` does.
    """
    found, tested = _headers(train), _headers(test)
    several = _several_frames(train, [place for place, _ in found])
    deep = [place for place, seen in found if seen.deep]
    levels: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    if deep and 2 * len(deep) > len(found):
        levels, notes = _shared_levels(train, deep)
    elif deep or any(seen.deep for _, seen in tested):
        many = len(deep) + sum(seen.deep for _, seen in tested)
        notes = (
            f"{many} of {len(found) + len(tested)} pictures looked at are 16-bit ones among others: of each, "
            "its own largest value says how many bits it uses",
        )
    notes += several
    if not found:
        return Looked(None, None, levels, notes)
    sizes = [(seen.height, seen.width) for _, seen in found]
    height, width = (int(value) for value in np.median(sizes, 0))
    return Looked(sizes[0] if len(set(sizes)) == 1 else None, (height, width), levels, notes)


def _headers(source: Source) -> list[tuple[int, Header]]:
    """Places and headers of some pictures."""
    found = []
    for place in evenly(len(source), _LOOKED_AT):
        try:
            name, picture, _ = source[place]
            found.append((place, header(picture, name)))
        except UserError:
            continue
    return found


def _several_frames(source: Source, places: Sequence[int]) -> tuple[str, ...]:
    """A note on animations and documents of several pages."""
    many = [name for name, picture, _ in (source[place] for place in places) if frames(picture) > 1]
    if not many:
        return ()
    return (
        f"{len(many)} of {len(places)} pictures looked at hold several frames or pages, such as '{many[0]}': "
        "the first is taken",
    )


def look_at_masks(count: int, place: Callable[[int], Path]) -> tuple[str, ...]:
    """Looks at some masks with a palette whose indices are the classes, and says what may be otherwise.

    Args:
        count: how many masks there are.
        place: the file of each.

    Raises:
        UserError: an index is one colour in one mask and another in another.
    """
    colours: dict[int, tuple[int, int, int]] = {}
    firsts: dict[int, Path] = {}
    for path in map(place, evenly(count, _LOOKED_AT)):
        for index, colour in used_colours(path).items() if path.suffix.lower() in ENDINGS else ():
            if colours.setdefault(index, colour) != colour:
                raise UserError(
                    f"index {index} of their palettes is {colours[index]} in mask '{firsts[index]}' and "
                    f"{colour} in '{path}': {_COLOURS_WAY}"
                )
            firsts.setdefault(index, path)
    odd = [index for index, (red, *_) in colours.items() if red != index]
    if not odd or any(len({*colour}) > 1 for colour in colours.values()):
        return ()
    shown = f"{odd[0]} of '{firsts[odd[0]]}' is grey {colours[odd[0]][0]}"
    return (f"warning: indices of the masks' palettes are the classes, and {shown}: {_COLOURS_WAY}",)


_COLOURS_WAY = "where colours say the class, data.classes=FILE with 'red green blue name' lines takes them"


def _shared_levels(source: Source, deep: Sequence[int]) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    """Black and white of 16-bit pictures that do not say their depth, and a note where it is not 16 bits."""
    if not any(_values(source, place) for place in deep[:8]):
        return None, ()  # they do say it
    values = [pair for place in evenly(len(source), _READ) if (pair := _values(source, place))]
    low, high = min(pair[0] for pair in values), max(pair[1] for pair in values)
    if high - low >= 2**15 or low == high:
        return _FULL, ()
    line = f"16-bit pictures: values {low} to {high} become black to white, in training and test alike"
    return (low, high), (line,)


def _values(source: Source, place: int) -> tuple[int, int] | None:
    try:
        return deep_values(source[place].picture)
    except UserError:
        return None
