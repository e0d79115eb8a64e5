"""Folders of pictures and masks: paired by name, split or not."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.pictures.count import Masked
from diffkd.pictures.joint import VOID, JointOptions
from diffkd.pictures.masks import MaskFiles, SomeMasked, masked_splits, pair_up
from diffkd.pictures.memory import hold_out
from diffkd.pictures.options import data_folder, quoted, spread
from diffkd.pictures.splits import TEST_NAMES, find_splits, innermost, inside
from diffkd.pictures.tables import is_colour, named, read_table

_WAY = "data.images and data.masks name the folders of both"


@spread(JointOptions)
def build(
    root: str | None,
    *,
    classes: str | list[str] | None = None,
    images: str = "images",
    masks: str = "masks",
    mask_suffix: str = "",
    ignore_index: int | None = VOID,
    val_fraction: float = 0.1,
    test_folder: str | None = None,
    options: JointOptions,
) -> Data:
    """Pictures in `images/train/`, masks of the same names in `masks/train/`, tested on `val`.

    `train/images/` and `train/masks/` are understood, too. Without a folder `train` in them, some of the
    pictures in `images` and `masks` are held out as test.
    Masks are grey or palette PNGs whose values are the classes, of 8 or 16 bits, or coloured ones with a
    table of colours. Test pictures keep their size.

    Args:
        root: the folder that holds `images` and `masks`.
        classes: a file with one class a line (a name; a value and a name; red, green, blue and a name),
            or the names; None takes `classes.txt` of the folder if it is there, else the values.
        images: name of the folder of pictures.
        masks: name of the folder of masks.
        mask_suffix: what masks' names end with in addition to their pictures'.
        ignore_index: the value of pixels that mean nothing.
        val_fraction: share to test on where there is no such folder, always the same.
        test_folder: name of the folder to test on: the first of `val`, `valid`, `validation`, `test`
            that is there, if not given.
        options: how pictures and masks are changed in training.

    Raises:
        UserError: a picture or a mask is missing or damaged, sizes differ, or a mask holds a value that
            means nothing; it is named.
    """
    folder, around = innermost(data_folder(root, "masks"))
    names, codes, notes = _classes(classes, folder)
    pair = partial(pair_up, suffix=mask_suffix, coloured=any(map(is_colour, codes or ())))
    train, test, said = _splits(folder, (images, masks), pair, test_folder, val_fraction)
    found = masked_splits(train, test, options, names=names, codes=codes, ignore=ignore_index)
    told = (*around, *said, *notes, *found["notes"])
    return Data(**found | {"notes": told, "test_held_out": isinstance(test, SomeMasked)})


def _classes(
    given: str | list[str] | None, folder: Path
) -> tuple[tuple[str, ...] | None, dict[int, int] | None, tuple[str, ...]]:
    """Names of the classes, what the masks' codes mean, and a note where a file was found."""
    if isinstance(given, list):
        return *named(given), ()
    if given is not None:
        return *read_table(Path(given).expanduser()), ()
    place = folder / "classes.txt"
    if place.is_file():
        return *read_table(place), (f"classes as '{place}' says",)
    return None, None, ()


def _splits(
    folder: Path,
    kinds: tuple[str, str],
    pair: Callable[[Path, Path], MaskFiles],
    test_folder: str | None,
    val_fraction: float,
) -> tuple[Masked, Masked, tuple[str, ...]]:
    """Training and test pairs, and a note where there was a choice."""
    outside = not any((folder / kind).is_dir() for kind in kinds)
    pictures = folder if outside else _needed(folder / kinds[0])
    found = find_splits(pictures, test_folder)
    if found.train is None:
        pictures, masks = (_needed(folder / kind) for kind in kinds)
        whole = pair(pictures, masks)
        kept, held = hold_out(len(whole), val_fraction)
        note = f"no test split in '{pictures}': {len(held)} of its {len(whole)} pictures held out as one"
        return SomeMasked(whole, kept), SomeMasked(whole, held), (note,)
    if found.test is None:
        raise UserError(f"'{pictures}' has a folder '{found.train}' but none of {quoted(TEST_NAMES, 4)}")
    places = [
        [folder / split / kind if outside else _needed(folder / kind) / split for kind in kinds]
        for split in (found.train, found.test)
    ]
    train, test = (pair(*map(_needed, both)) for both in places)
    return train, test, found.notes


def _needed(folder: Path) -> Path:
    """The folder, or the one of other capitals in its place."""
    beside = inside(folder.parent) if folder.parent.is_dir() else []
    alike = [there for there in beside if there.lower() == folder.name.lower()]
    if folder.name not in beside and len(alike) != 1:
        there = f" (there: {quoted(beside, 6)})" * bool(beside)
        raise UserError(f"no folder '{folder.name}' in '{folder.parent}'{there}; {_WAY}")
    return folder if folder.name in beside else folder.with_name(alike[0])
