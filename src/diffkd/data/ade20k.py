"""ADE20K as the scene parsing benchmark has it (arXiv 1608.05442): 150 classes."""

from pathlib import Path

from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.pictures.joint import VOID, JointOptions
from diffkd.pictures.masks import masked_splits, pair_up
from diffkd.pictures.options import data_folder, spread

_COUNT = 150


@spread(JointOptions)
def build(root: str | None, *, options: JointOptions) -> Data:
    """`images` and `annotations` of `training` and `validation`, as `ADEChallengeData2016` comes.

    Values 1 to 150 are the classes, 0 is void. Their names are those of `objectInfo150.txt` where it is.

    Args:
        root: the folder that holds `images` and `annotations`.
        options: how pictures and masks are changed in training.

    Raises:
        UserError: a picture or a mask is missing or damaged; it is named.
    """
    folder = data_folder(root, "ade20k")
    pairs = [
        pair_up(_needed(folder / "images" / name), _needed(folder / "annotations" / name))
        for name in ("training", "validation")
    ]
    codes = {0: VOID} | {i + 1: i for i in range(_COUNT)}
    return Data(**masked_splits(pairs[0], pairs[1], options, names=_names(folder), codes=codes))


def _needed(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}'; data.root is the folder ADEChallengeData2016")
    return folder


def _names(folder: Path) -> tuple[str, ...]:
    """The first of each class's names, or its value."""
    place = folder / "objectInfo150.txt"
    rows = [line.split("\t") for line in place.read_text().splitlines()] if place.is_file() else []
    names = [row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdecimal()]
    return tuple(names) if len(names) == _COUNT else tuple(str(i + 1) for i in range(_COUNT))
