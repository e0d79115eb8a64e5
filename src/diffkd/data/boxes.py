"""Your own pictures with boxes: COCO JSON, Pascal VOC XML or YOLO text, found out and said."""

from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.pictures.boxes.annotations import Annotated
from diffkd.pictures.boxes.find import Format, find
from diffkd.pictures.boxes.views import BoxOptions, boxed, held_out_boxes
from diffkd.pictures.options import data_folder, quoted, spread
from diffkd.pictures.splits import TEST_NAMES, innermost


@spread(BoxOptions)
def build(
    root: str | None,
    *,
    format: Format = "auto",
    val_fraction: float = 0.1,
    test_split: str | None = None,
    options: BoxOptions,
) -> Data:
    """Pictures with boxes, split as their folder says, or with a part held out.

    Args:
        root: the folder. COCO: JSON files whose names or folders say their split (`instances_train2017.json`,
            `train.json`, `train/_annotations.coco.json`). VOC: a folder of XML files and one of pictures,
            with `ImageSets/Main` or folders named after the splits. YOLO: a `data.yaml`, or folders
            `images` and `labels`.
        format: "coco", "voc" or "yolo"; "auto" finds it out.
        val_fraction: share of the pictures to test on where there is no test split, always the same.
        test_split: which to test on, where it is not the first of `val`, `valid`, `validation`, `test`.
        options: how pictures are resized and augmented.

    Raises:
        UserError: there are no boxes, or something in them is wrong; the file is named.
    """
    folder, around = innermost(data_folder(root, "boxes"))
    found = find(folder, format)
    names = [name for name in TEST_NAMES if name in found.splits]
    if test_split is not None and test_split not in names:
        raise UserError(f"data.test_split='{test_split}': '{folder}' has {quoted(names) or 'none'}")
    notes = [*around, found.what]
    train_name = "train" if "train" in found.splits else ""
    if train_name not in found.splits:
        raise UserError(f"'{folder}' has {quoted(list(found.splits))} but no split to train on")
    train = found.splits[train_name]()
    notes += train.notes
    if names:
        chosen = test_split or names[0]
        test = found.splits[chosen]()
        notes += test.notes
        if len(names) > 1 and test_split is None:
            others = quoted([name for name in names if name != chosen])
            notes.append(f"tested on '{chosen}', not on {others}: data.test_split chooses")
        train, test = _same_classes(train, test, f"'{chosen}'")
    else:
        train, test, note = held_out_boxes(train, val_fraction)
        notes.append(note)
    return Data(**boxed(train, test, options, notes), test_held_out=not names)


def _same_classes(train: Annotated, test: Annotated, where: str) -> tuple[Annotated, Annotated]:
    """Both splits with one numbering: that of the training boxes."""
    return train, test if train.classes == test.classes else test.relabelled(train.classes, where)
