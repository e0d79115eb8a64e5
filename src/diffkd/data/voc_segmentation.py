"""PASCAL VOC's segmentation: 20 classes and the ground."""

from pathlib import Path

from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.pictures.joint import VOID, JointOptions
from diffkd.pictures.masks import MaskFiles, masked_splits
from diffkd.pictures.options import data_folder, spread

_CLASSES = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]


@spread(JointOptions)
def build(
    root: str | None, *, train_set: str = "train", masks: str = "SegmentationClass", options: JointOptions
) -> Data:
    """`JPEGImages`, `SegmentationClass` and `ImageSets/Segmentation` of one year, tested on `val`.

    Args:
        root: the folder that holds them, such as `VOCdevkit/VOC2012`.
        train_set: the list of pictures to train on: `train`, or `trainaug` where the masks of the
            Semantic Boundaries Dataset were added.
        masks: the folder of masks (`SegmentationClassAug` with `trainaug`).
        options: how pictures and masks are changed in training.

    Raises:
        UserError: a list, a picture or a mask is missing or damaged; it is named.
    """
    folder = data_folder(root, "voc_segmentation")
    train, test = (_split(folder, name, masks) for name in (train_set, "val"))
    return Data(**masked_splits(train, test, options, names=_CLASSES, ignore=VOID))


def _split(folder: Path, name: str, masks: str) -> MaskFiles:
    place = folder / "ImageSets" / "Segmentation" / f"{name}.txt"
    if not place.is_file():
        raise UserError(f"no list of pictures '{place}'; data.root is the folder of one year")
    found = [line.split()[-1] for line in place.read_text().splitlines() if line.strip()]
    # lists of the added masks give paths, VOC's own give names
    names = [Path(name).stem for name in found]
    return MaskFiles(
        [folder / "JPEGImages" / f"{name}.jpg" for name in names],
        [folder / masks / f"{name}.png" for name in names],
    )
