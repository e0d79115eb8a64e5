"""Label maps of COCO's annotations: polygons and run lengths, every category a class."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.pictures.joint import VOID, JointOptions
from diffkd.pictures.masks import masked_splits
from diffkd.pictures.options import data_folder, same_classes, spread


@spread(JointOptions)
def build(
    root: str | None,
    *,
    train: str = "train.json",
    test: str = "test.json",
    train_images: str = "train",
    test_images: str = "test",
    options: JointOptions,
) -> Data:
    """Two files of annotations and two folders of pictures.

    Class 0 is the ground, then come the categories in the order of their ids. Where objects of different
    categories overlap, the pixels are void.

    Args:
        root: where the names below begin.
        train: file of the annotations to train on.
        test: file of those to test on.
        train_images: folder of the pictures to train on.
        test_images: folder of those to test on.
        options: how pictures and masks are changed in training.

    Raises:
        UserError: a file is missing or damaged, or an annotation has no outline; it is named.
    """
    folder = data_folder(root, "coco_segmentation")
    first, second = (
        Annotated(folder / file, folder / pictures)
        for file, pictures in ((train, train_images), (test, test_images))
    )
    same_classes(first.names, second.names, str(folder / test))
    found = masked_splits(first, second, options, names=("ground", *first.names), ignore=VOID)
    return Data(**found)


class Annotated:
    """Pictures with COCO annotations, drawn as label maps when they are wanted.

    Args:
        file: of the annotations.
        pictures: folder of the pictures.

    Raises:
        UserError: the file cannot be read as annotations.
    """

    reads = "outlines"
    notes: tuple[str, ...] = ()

    def __init__(self, file: Path, pictures: Path) -> None:
        self.annotations = file
        try:
            content = json.loads(file.read_text())
            categories = sorted(content["categories"], key=lambda row: row["id"])
            self.images = content["images"]
            annotations = content["annotations"]
            self.sizes = [(int(row["height"]), int(row["width"])) for row in self.images]
            self.files = [pictures / str(row["file_name"]) for row in self.images]
            identities = [row["id"] for row in self.images]
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"'{file}' cannot be read as COCO annotations: {what}") from error
        self.names = tuple(row["name"] for row in categories)
        self.classes = {row["id"]: i + 1 for i, row in enumerate(categories)}
        self.objects: dict[int, list[dict[str, Any]]] = {identity: [] for identity in identities}
        for row in annotations:
            self._keep(row)

    def _keep(self, row: dict[str, Any]) -> None:
        """An annotation with its picture's, if it is whole."""
        if not isinstance(row, dict):
            raise UserError(f"'{self.annotations}': an annotation is no object but {row!r}")
        where = f"'{self.annotations}', annotation {row.get('id')}"
        for key, known in (("image_id", self.objects), ("category_id", self.classes)):
            if row.get(key) not in known:
                raise UserError(f"{where}: no {key.removesuffix('_id')} has the id {row.get(key)}")
        if not row.get("segmentation"):
            raise UserError(f"{where} has no outline: boxes alone do not say which pixels are meant")
        self.objects[row["image_id"]].append(row)

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, index: int) -> Path:
        """The picture's file."""
        return self.files[index]

    def place(self, index: int) -> str:
        """The file of the annotations, and the picture."""
        return f"{self.annotations}: {self.images[index]['file_name']}"

    def file(self, index: int) -> Path:
        """The file of the annotations."""
        return self.annotations

    def codes(self, index: int) -> np.ndarray:
        """Classes `(H, W)`."""
        image, size = self.images[index], self.sizes[index]
        labels = np.zeros(size, np.int64)
        for row in self.objects[image["id"]]:
            there, label = (
                _drawn(row["segmentation"], size, self.place(index)),
                self.classes[row["category_id"]],
            )
            clash = there & (labels != 0) & (labels != label)
            labels[there] = label
            labels[clash] = VOID
        return labels


def _drawn(outline: Any, size: tuple[int, int], place: str) -> np.ndarray:
    """Which pixels `(H, W)` an outline covers: polygons, or run lengths compressed or not."""
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise UserError(
            "data 'coco_segmentation' needs pycocotools: pip install 'diffkd[segmentation]'"
        ) from error
    try:
        if isinstance(outline, list):
            outline = coco.merge(coco.frPyObjects(outline, *size))
        elif isinstance(outline["counts"], list):
            outline = coco.frPyObjects(outline, *size)
        found = coco.decode(outline).astype(bool)
    except Exception as error:
        raise UserError(f"'{place}': an outline cannot be read: {error}") from error
    if found.shape != size:
        raise UserError(f"'{place}': an outline is for {found.shape} pixels, the picture has {size}")
    return np.asarray(found)
