"""Pictures with their boxes as detectors see them: resized, and changed at random together to train on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as v2

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.pictures.boxes.annotations import Annotated
from diffkd.pictures.decoding import decode
from diffkd.pictures.files import IMAGENET_MEAN, IMAGENET_STD, Pictures
from diffkd.pictures.joint import RandomScale
from diffkd.pictures.look import Placed, look_over
from diffkd.pictures.memory import hold_out
from diffkd.pictures.options import alike, quoted
from diffkd.pictures.twins import shared_pictures
from diffkd.pictures.view import TestView


@dataclass(frozen=True)
class BoxOptions:
    """How pictures are resized, and changed together with their boxes to train on.

    Attributes:
        size: pixels that a picture's shorter side is brought to.
        max_size: most pixels of its longer side, which wins.
        train_sizes: sizes to draw from for training (multi-scale); `size` alone if not given.
        flip: mirror left and right at random; turn it off where that changes the class.
        min_scale, max_scale: a training picture is first resized by a factor drawn between the two, and
            not brought to `size` then (scale jitter); 1 and 1 turn it off.
        photometric: change brightness, contrast, saturation and hue at random.
        iou_crop: random crops that overlap with some box at least so much (SSD, arXiv 1512.02325).
        mosaic: share of training pictures that are put together from four.
        max_corrupt: how many unreadable files of a split are skipped, each with a warning; the next
            one more stops the run.

    Raises:
        UserError: an option is out of its range.
    """

    size: int = 640
    max_size: int = 1024
    train_sizes: list[int] | None = None
    flip: bool = True
    min_scale: float = 1.0
    max_scale: float = 1.0
    photometric: bool = False
    iou_crop: bool = False
    mosaic: float = 0.0
    max_corrupt: int = 0

    def __post_init__(self) -> None:
        for size in (self.size, *(self.train_sizes or ())):
            if not 1 <= size <= self.max_size:
                raise UserError(f"data.size={size}: needs at least 1 and at most max_size={self.max_size}")
        if not 0 < self.min_scale <= self.max_scale:
            raise UserError(
                f"data.min_scale={self.min_scale}, data.max_scale={self.max_scale}: "
                "need two factors above 0, the smaller first"
            )
        if not 0 <= self.mosaic <= 1:
            raise UserError(f"data.mosaic={self.mosaic}: needs a share, 0 to 1")
        if self.max_corrupt < 0:
            raise UserError(f"data.max_corrupt={self.max_corrupt} is negative")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of a typical picture, three to four."""
        return 3, self.size, min(self.max_size, -(-self.size * 4 // 96) * 32)

    @property
    def view(self) -> TestView:
        """Of test pictures: whole, at their size."""
        return TestView("shortest", (self.size, self.max_size))

    def train_view(self) -> Any:
        """Changes a sample of tv_tensors (`image`, `boxes`) to a random view of it."""
        steps: list[Any] = []
        if self.photometric:
            steps.append(transforms.RandomPhotometricDistort())
        if self.iou_crop:
            steps.append(_CropWithBoxes())
        if self.flip:
            steps.append(transforms.RandomHorizontalFlip())
        if (self.min_scale, self.max_scale) != (1, 1):
            steps += [RandomScale(self.min_scale, self.max_scale), _Shrink(self.max_size)]
        else:
            steps.append(transforms.RandomShortestSize(self.train_sizes or [self.size], self.max_size))
        return transforms.Compose([*steps, transforms.ClampBoundingBoxes()])

    def test_view(self) -> Any:
        """Changes a sample to its size."""
        return transforms.RandomShortestSize([self.size], self.max_size)

    def splits(
        self, train: Annotated, test: Annotated, levels: tuple[int, int] | None = None
    ) -> tuple["BoxPictures", "BoxPictures"]:
        """Samples to train on, changed at random, and to test on; `levels` as for `decode`."""
        return tuple(  # type: ignore[return-value]
            BoxPictures(part, self, training=training, levels=levels)
            for part, training in ((train, True), (test, False))
        )


class _CropWithBoxes(transforms.Transform):  # type: ignore[misc]
    """A random crop that keeps boxes, of pictures that have some."""

    def __init__(self) -> None:
        super().__init__()
        self.crop = transforms.RandomIoUCrop()

    def forward(self, *inputs: Any) -> Any:
        """The sample, cropped or as it was."""
        return self.crop(*inputs) if len(inputs[0]["boxes"]) else inputs[0]


class _Shrink(transforms.Transform):  # type: ignore[misc]
    """Shrinks what is longer than so many pixels to that."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """One of the sample's parts."""
        height, width = transforms.functional.get_size(inpt)
        factor = self.longest / max(height, width)
        if factor >= 1:
            return inpt
        size = [max(round(height * factor), 1), max(round(width * factor), 1)]
        return self._call_kernel(v2.resize, inpt, size=size, antialias=True)


class BoxPictures(Pictures):
    """Map-style samples: a picture `(3, H, W)` uint8, and a dict of its boxes.

    Pictures wide and high come in batches of their own, where the annotations say their sizes. The
    dict has `boxes` `(n, 4)` and `labels` `(n,)`. Of test pictures also `ignore` and `area`, and
    `origin`, the picture's own `(H, W)`, in pixels of which its boxes stay; what is ignored is left out
    of training ones.

    Args:
        source: pictures and boxes.
        options: how they are changed.
        training: random views, or whole pictures.
        levels: see `decode`.
    """

    def __init__(
        self,
        source: Annotated,
        options: BoxOptions,
        *,
        training: bool,
        levels: tuple[int, int] | None = None,
    ) -> None:
        self.view = options.train_view() if training else options.test_view()
        kept: Any = {"leave_out": not training, "levels": levels}
        super().__init__(source, self.view, options.max_corrupt, **kept)  # type: ignore[arg-type]
        self.annotated, self.training, self.mosaic, self.options = source, training, options.mosaic, options
        # less padding where what is wide and what is high do not share batches
        self.groups = (source.sizes[:, 0] > source.sizes[:, 1]).astype(np.int64)

    def part(self, places: np.ndarray, *, training: bool) -> "BoxPictures":
        """The pictures at some places `(n,)`, in random views or whole."""
        part = self.annotated.part(places)
        return BoxPictures(part, self.options, training=training, levels=self.levels)

    def picture(self, place: int) -> tuple[str, Path]:
        """What an error calls the picture at a place, and its file."""
        path = self.annotated.place(place)
        return str(path), path

    def sample(self, place: int) -> tuple[Tensor, dict[str, Any]]:
        """Picture and boxes at a place.

        Raises:
            UserError: it cannot be read, or has another size than its annotations say.
        """
        if not self.training:
            return self._whole(place)
        mixed = bool(self.mosaic) and torch.rand(()).item() < self.mosaic
        sample = self.view(self._mosaic(place) if mixed else self._read(place))
        boxes = sample["boxes"].as_subclass(Tensor)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return sample["image"].as_subclass(Tensor), {"boxes": boxes[kept], "labels": sample["labels"][kept]}

    def _whole(self, place: int) -> tuple[Tensor, dict[str, Any]]:
        read = self._read(place, ignored=True)
        boxes, image = read["boxes"].as_subclass(Tensor), self.view(read["image"])
        rows = slice(self.annotated.starts[place], self.annotated.starts[place + 1])
        own = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        area = torch.from_numpy(self.annotated.area[rows].copy())
        target = {
            "boxes": boxes,
            "labels": read["labels"],
            "ignore": torch.from_numpy(self.annotated.ignore[rows].copy()),
            "area": torch.where(area.isnan(), own, area),
            "origin": tuple(read["image"].shape[-2:]),
        }
        return image.as_subclass(Tensor), target

    def _read(self, place: int, ignored: bool = False) -> dict[str, Any]:
        """A sample before it is changed."""
        found, path = self.annotated, self.annotated.place(place)
        image = v2.pil_to_tensor(decode(path, str(path), levels=self.levels))
        height, width = image.shape[-2:]
        said = tuple(found.sizes[place].tolist())
        if all(said) and said != (height, width):
            raise UserError(
                f"picture '{path}' has {height}x{width} pixels, its annotations say {said[0]}x{said[1]}"
            )
        rows = slice(found.starts[place], found.starts[place + 1])
        boxes, labels = (torch.from_numpy(x[rows].copy()) for x in (found.boxes, found.labels))
        if found.relative:
            boxes = boxes * torch.tensor([width, height, width, height])
        if not ignored:
            keep = ~torch.from_numpy(found.ignore[rows].copy())
            boxes, labels = boxes[keep], labels[keep]
        wrapped = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
        return {"image": tv_tensors.Image(image), "boxes": wrapped, "labels": labels}

    def _mosaic(self, place: int) -> dict[str, Any]:
        """Four pictures side by side and one below the other (arXiv 2004.10934), each at half the size."""
        others = torch.randint(len(self), (3,)).tolist()
        parts = [self._read(i) for i in (place, *others)]
        height, width = parts[0]["image"].shape[-2:]
        canvas = torch.zeros(3, height, width, dtype=torch.uint8)
        middle, centre = height // 2, width // 2
        boxes, labels = [], []
        for i, part in enumerate(parts):
            top, left = (i // 2) * middle, (i % 2) * centre
            small = transforms.Resize((middle, centre), antialias=True)(part)
            canvas[:, top : top + middle, left : left + centre] = small["image"]
            boxes.append(small["boxes"].as_subclass(Tensor) + torch.tensor([left, top, left, top]))
            labels.append(part["labels"])
        wrapped = tv_tensors.BoundingBoxes(torch.cat(boxes), format="XYXY", canvas_size=(height, width))
        return {"image": tv_tensors.Image(canvas), "boxes": wrapped, "labels": torch.cat(labels)}


def collate(rows: list[Any]) -> Batch:
    """A batch of pictures of any sizes: lists of pictures and of targets."""
    images, targets = zip(*rows, strict=True)
    return Batch(list(images), list(targets))


def boxed(train: Annotated, test: Annotated, options: BoxOptions, notes: Sequence[str]) -> dict[str, Any]:
    """The fields of `diffkd.Data` of two splits with one numbering of classes.

    Args:
        train: the split to train on.
        test: the split to test on.
        options: how pictures are changed.
        notes: what was found.

    Raises:
        UserError: there is no box to train on, or to test on.
    """
    for split, what in ((train, "to train on"), (test, "to test on: no answer could be right")):
        if not len(split.labels):
            raise UserError(f"there is not one box {what} ({'; '.join(notes)})")
    unseen = [name for i, name in enumerate(train.classes) if i not in set(train.labels.tolist())]
    notes = [*notes, *alike(train.classes)]
    notes += [f"no box to train on is of class {quoted(unseen)}"] * bool(unseen)
    looked = look_over(*(Placed(len(split), split.place) for split in (train, test)))
    return {
        **dict(zip(("train", "test"), options.splits(train, test, looked.levels), strict=True)),
        "num_classes": len(train.classes),
        "image_shape": options.image_shape,
        "view": replace(options.view, levels=looked.levels),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "class_names": train.classes,
        "collate": collate,
        "notes": (
            *notes,
            *looked.notes,
            *shared_pictures((len(train), train.place), (len(test), test.place)),
        ),
    }


def held_out_boxes(source: Annotated, fraction: float) -> tuple[Annotated, Annotated, str]:
    """A part to train on, a part to test on, always the same, and a note that says so."""
    train, test = hold_out(len(source), fraction)
    note = f"no test split: {len(test)} of {len(source)} pictures held out as one"
    return source.part(np.asarray(train)), source.part(np.asarray(test)), note
