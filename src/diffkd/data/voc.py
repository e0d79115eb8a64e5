"""Pascal VOC: trained on 2007 and, where it is there, 2012; tested on 2007; 20 kinds of things in boxes."""

from pathlib import Path

from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.pictures.boxes import voc
from diffkd.pictures.boxes.annotations import Annotated
from diffkd.pictures.boxes.views import BoxOptions, boxed
from diffkd.pictures.options import data_folder, spread

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable"),
    *("dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@spread(BoxOptions)
def build(root: str | None, *, options: BoxOptions) -> Data:
    """`trainval` of 2007 and 2012 to train on, `test` of 2007 to test on.

    Args:
        root: the folder that holds `VOC2007` and perhaps `VOC2012` (usually `VOCdevkit`).
        options: how pictures are resized and augmented.

    Raises:
        UserError: a folder or list is missing, or something in it is wrong.
    """
    folder = data_folder(root, "voc")
    train = _split(folder / "VOC2007", "trainval")
    if (folder / "VOC2012").is_dir():
        train = train.joined(_split(folder / "VOC2012", "trainval"), folder)
    test = _split(folder / "VOC2007", "test")
    return Data(**boxed(train, test, options, [*train.notes, *test.notes]))


def _split(year: Path, name: str) -> Annotated:
    listed = voc.split_names(year).get(name)
    if listed is None:
        raise UserError(f"no '{year}/ImageSets/Main/{name}.txt'")
    return voc.read(year / "Annotations", year / "JPEGImages", listed).relabelled(CLASSES, f"'{year}'")
