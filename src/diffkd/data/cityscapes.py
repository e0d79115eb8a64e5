"""Cityscapes (arXiv 1604.01685): 2,975 street scenes to train on, 500 to test on, 19 classes."""

from pathlib import Path

from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.pictures.joint import VOID, JointOptions
from diffkd.pictures.masks import MaskFiles, masked_splits
from diffkd.pictures.options import data_folder, spread

_CLASSES = {  # label id to name, in the order of the train ids; all others are void
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}


@spread(JointOptions)
def build(root: str | None, *, options: JointOptions) -> Data:
    """`leftImg8bit/SPLIT/CITY/` and `gtFine/SPLIT/CITY/..._labelIds.png` for `train` and `val`, as they come.

    Args:
        root: the folder that holds `leftImg8bit` and `gtFine`.
        options: how pictures and masks are changed in training.

    Raises:
        UserError: a picture or a mask is missing or damaged; it is named.
    """
    folder = data_folder(root, "cityscapes")
    train, test = (_split(folder, name) for name in ("train", "val"))
    codes = dict.fromkeys(range(256), VOID) | {code: i for i, code in enumerate(_CLASSES)}
    return Data(**masked_splits(train, test, options, names=tuple(_CLASSES.values()), codes=codes))


def _split(folder: Path, name: str) -> MaskFiles:
    pictures = sorted((folder / "leftImg8bit" / name).glob("*/*_leftImg8bit.png"))
    if not pictures:
        raise UserError(f"no pictures like 'leftImg8bit/{name}/CITY/..._leftImg8bit.png' in '{folder}'")
    masks = [
        folder / "gtFine" / name / p.parent.name / p.name.replace("_leftImg8bit", "_gtFine_labelIds")
        for p in pictures
    ]
    return MaskFiles(pictures, masks)
