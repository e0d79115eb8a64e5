"""CamVid: 367 street scenes to train on and 233 to test on, 11 classes."""

from pathlib import Path

from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.pictures.joint import VOID, JointOptions
from diffkd.pictures.masks import MaskFiles, masked_splits, pair_up
from diffkd.pictures.options import data_folder, spread

_CLASSES = [
    "sky",
    "building",
    "pole",
    "road",
    "sidewalk",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
]
_VOID = 11


@spread(JointOptions)
def build(root: str | None, *, options: JointOptions) -> Data:
    """Pictures in `train` and `test`, masks in `trainannot` and `testannot`; or in `images`, `masks`.

    The first is the form of 480x360 pixels with 11 classes and 11 for void that papers compare on; the
    second that of the data set `masks`, with `train` and `test` in both folders and 255 for void.

    Args:
        root: the folder that holds them.
        options: how pictures and masks are changed in training.

    Raises:
        UserError: a picture or a mask is missing or damaged; it is named.
    """
    folder = data_folder(root, "camvid")
    train, test = (_split(folder, name) for name in ("train", "test"))
    codes = {i: i for i in range(len(_CLASSES))} | {_VOID: VOID, VOID: VOID}
    return Data(**masked_splits(train, test, options, names=_CLASSES, codes=codes))


def _split(folder: Path, name: str) -> MaskFiles:
    for pictures, masks in ((name, f"{name}annot"), (f"images/{name}", f"masks/{name}")):
        if (folder / pictures).is_dir() and (folder / masks).is_dir():
            return pair_up(folder / pictures, folder / masks)
    raise UserError(
        f"no folders '{name}' and '{name}annot', nor 'images/{name}' and 'masks/{name}' in '{folder}'"
    )
