"""COCO 2017: 118,287 pictures to train on and 5,000 to test on, 80 kinds of things in boxes."""

from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.pictures.boxes import coco
from diffkd.pictures.boxes.views import BoxOptions, boxed
from diffkd.pictures.options import data_folder, spread


@spread(BoxOptions)
def build(root: str | None, *, options: BoxOptions) -> Data:
    """The splits of 2017, as they are published.

    Labels are COCO's ids less one, 0 to 89 with gaps: so torchvision's detectors count, whose published
    weights then fit.

    Args:
        root: the folder that holds `annotations`, `train2017` and `val2017`.
        options: how pictures are resized and augmented.

    Raises:
        UserError: a file or folder is missing, or something in it is wrong.
    """
    folder = data_folder(root, "coco")
    splits = []
    for name in ("train2017", "val2017"):
        place = folder / "annotations" / f"instances_{name}.json"
        if not place.is_file():
            raise UserError(f"no '{place}': data.root holds annotations/, train2017/ and val2017/")
        splits.append(coco.read(place, folder / name, keep_ids=True))
    return Data(**boxed(splits[0], splits[1], options, [*splits[0].notes, *splits[1].notes]))
