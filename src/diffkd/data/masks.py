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
from diffkd.pictures.tables import is_colour, named, read_table

_TEST_NAMES = ("val", "valid", "validation", "test")


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

    Without a folder `train` in them, some of the pictures in `images` and `masks` are held out as test.
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
    folder = data_folder(root, "masks")
    names, codes, notes = _classes(classes, folder)
    pair = partial(pair_up, suffix=mask_suffix, coloured=any(map(is_colour, codes or ())))
    train, test, said = _splits(folder, (images, masks), pair, test_folder, val_fraction)
    found = masked_splits(train, test, options, names=names, codes=codes, ignore=ignore_index)
    split = (folder / images / "train").is_dir()
    return Data(**found | {"notes": (*said, *notes, *found["notes"]), "test_held_out": not split})


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
    pictures, masks = (_needed(folder / kind, kind) for kind in kinds)
    if not (pictures / "train").is_dir():
        if test_folder is not None:
            raise UserError(f"data.test_folder='{test_folder}', but '{pictures}' has no folder 'train'")
        whole = pair(pictures, masks)
        kept, held = hold_out(len(whole), val_fraction)
        note = f"no test split in '{pictures}': {len(held)} of its {len(whole)} pictures held out as one"
        return SomeMasked(whole, kept), SomeMasked(whole, held), (note,)
    found = [name for name in _TEST_NAMES if (pictures / name).is_dir()]
    if not found and test_folder is None:
        raise UserError(f"'{pictures}' has a folder 'train' but none of {quoted(_TEST_NAMES, 4)}")
    test = test_folder or found[0]
    notes: tuple[str, ...] = ()
    if test_folder is None and len(found) > 1:
        notes = (f"tested on '{test}', not on {quoted(found[1:])}: data.test_folder chooses",)
    splits = [pair(_needed(pictures / name, name), _needed(masks / name, name)) for name in ("train", test)]
    return splits[0], splits[1], notes


def _needed(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"no folder '{name}' in '{folder.parent}'; data.images and data.masks name the two")
    return folder
