"""Picture files: decoded whatever their format, augmented one by one, corrupt ones named and skipped."""

import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import auto_augment as timm_augment
from torch import Tensor
from torchvision.transforms import RandomErasing
from torchvision.transforms import v2 as transforms

from diffkd.errors import UserError, nearest
from diffkd.pictures.memory import hold_out
from diffkd.pictures.view import TestView

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm")

_NAMED_POLICIES = {"randaugment": "rand-m9-mstd0.5", "autoaugment": "original-mstd0.5"}
_OWN_POLICIES = ("none", "crop", "light", "trivial")
_TIMM_POLICY = re.compile(
    r"rand(-(m|n|p|mstd|inc|mmax)[\d.]+|-t[a-z0-9]+)*|(original|originalr|v0|v0r|3a)(-mstd[\d.]+)?"
)


def decode(picture: Path | bytes | Image.Image, name: str, at_least: int | None = None) -> Image.Image:
    """A picture as 8-bit RGB, upright as its EXIF orientation says; of an animation the first frame.

    Grey, palette and CMYK pictures are converted, transparency is dropped, 16-bit grey is scaled
    to 8 bits.

    Args:
        picture: a file, its content, or a picture opened already.
        name: what an error calls it.
        at_least: pixels that the sides must keep where a JPEG may be decoded at a half, a quarter or
            an eighth of its size, which takes a fraction of the time; None decodes it in full.

    Raises:
        UserError: it is missing, empty, truncated, no picture, or of floating-point values.
    """
    try:
        if isinstance(picture, Image.Image):
            return _as_rgb(ImageOps.exif_transpose(picture))
        content = picture if isinstance(picture, bytes) else picture.read_bytes()
        if not content:
            raise ValueError("it is empty (0 bytes)")
        with Image.open(BytesIO(content)) as opened:
            if at_least is not None:
                opened.draft(None, (at_least, at_least))
            return _as_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # damaged files raise nearly anything, even SyntaxError
        reason = "it is no picture" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UserError(f"cannot read picture '{name}': {reason.partition(chr(10))[0]}") from error


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("it holds floating-point values; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its values do not fit 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("P", "PA"):  # straight to RGB warns where the palette has transparency
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


@dataclass(frozen=True)
class PictureOptions:
    """How pictures are augmented, one by one in the loader's processes.

    Attributes:
        image_size: height and width in pixels that every picture is brought to.
        augment: "none"; "light" (random resized crop); "crop" (random crop after padding by an
            eighth, for small pictures); or "light" followed by "randaugment" (arXiv 1909.13719),
            "autoaugment" (1805.09501), "trivial" (2103.10158) or a policy that timm knows by a text
            such as "rand-m9-mstd0.5-inc1", "v0" or "3a".
        flip: mirror left and right at random; turn it off where that changes the class.
        min_scale: smallest share of the picture that a random resized crop may show.
        random_erasing: probability that a rectangle is painted over with noise (arXiv 1708.04896).
        interpolation: how pictures are resized.
        crop_fraction: share of the picture's shorter side that test pictures show.
        max_corrupt: how many unreadable files of a split are skipped, each with a warning; the next
            one more stops the run.

    Raises:
        UserError: an option is out of its range, or `augment` unknown.
    """

    image_size: int = 224
    augment: str = "light"
    flip: bool = True
    min_scale: float = 0.08
    random_erasing: float = 0.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    crop_fraction: float = 0.875
    max_corrupt: int = 0

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"data.image_size={self.image_size} must be 1 or more pixels")
        if self.max_corrupt < 0:
            raise UserError(f"data.max_corrupt={self.max_corrupt} is negative")
        for name in ("min_scale", "random_erasing", "crop_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (value == 0 and name != "random_erasing"):
                raise UserError(f"data.{name}={value} must lie between 0 and 1")
        policy = _NAMED_POLICIES.get(self.augment, self.augment)
        if policy not in _OWN_POLICIES and not _TIMM_POLICY.fullmatch(policy):
            known = [*_OWN_POLICIES, *_NAMED_POLICIES, "rand-m9-mstd0.5", "original", "v0", "3a"]
            raise UserError(f"unknown data.augment '{self.augment}'{nearest(self.augment, known)}")
        try:
            self._policy()
        except (ValueError, AssertionError, KeyError) as error:
            raise UserError(f"data.augment '{self.augment}' is no policy that timm knows: {error}") from error

    def train_transform(self) -> Callable[[Image.Image], Tensor]:
        """From an RGB picture to a random view of it, `(3, image_size, image_size)` uint8."""
        if self.augment == "none":
            return self.test_transform()
        mode, size = self._mode, self.image_size
        steps: list[Any] = (
            [transforms.Resize((size, size), mode), transforms.RandomCrop(size, padding=max(size // 8, 1))]
            if self.augment == "crop"
            else [transforms.RandomResizedCrop(size, scale=(self.min_scale, 1.0), interpolation=mode)]
        )
        if self.flip:
            steps.append(transforms.RandomHorizontalFlip())
        steps += [*self._policy(), transforms.PILToTensor()]
        if self.random_erasing:
            steps.append(Erase(self.random_erasing))
        return transforms.Compose(steps)  # type: ignore[no-any-return]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of every picture."""
        return 3, self.image_size, self.image_size

    def splits(self, train: "Source", test: "Source") -> tuple["Pictures", "Pictures"]:
        """Samples to train on, augmented, and to test on."""
        # large enough for the smallest crop not to be magnified
        side = math.ceil(self.image_size / math.sqrt(self.min_scale))
        return (
            Pictures(train, self.train_transform(), self.max_corrupt, at_least=side),
            Pictures(test, self.test_transform(), self.max_corrupt),
        )

    @property
    def view(self) -> TestView:
        """Of test pictures: their centre."""
        size = (self.image_size, self.image_size)
        return TestView("crop", size, self.crop_fraction, self.interpolation)

    def test_transform(self) -> Callable[[Image.Image], Tensor]:
        """From an RGB picture to its centre, `(3, image_size, image_size)` uint8."""
        return self.view

    @property
    def _mode(self) -> Any:
        return transforms.InterpolationMode(self.interpolation)

    def _policy(self) -> list[Any]:
        """The transform of colours and shapes that `augment` names, if any."""
        if self.augment == "trivial":
            return [transforms.TrivialAugmentWide(interpolation=self._mode)]
        if self.augment in _OWN_POLICIES:
            return []
        text = _NAMED_POLICIES.get(self.augment, self.augment)
        make = (
            timm_augment.rand_augment_transform if text[:4] == "rand" else timm_augment.auto_augment_transform
        )
        settings = {
            "translate_const": int(self.image_size * 0.45),
            "img_mean": tuple(round(255 * m) for m in IMAGENET_MEAN),
            "interpolation": getattr(Image.Resampling, self.interpolation.upper()),
        }
        return [make(text, settings)]


class Erase:
    """Paints a random rectangle of a `(3, H, W)` uint8 picture over with noise (arXiv 1708.04896).

    The noise is normal, of ImageNet's mean and standard deviation, as if painted after normalisation.

    Args:
        probability: how often.
        scale: range of the rectangle's share of the area.
        ratio: range of its aspect ratio.
    """

    def __init__(
        self,
        probability: float,
        scale: tuple[float, float] = (0.02, 1 / 3),
        ratio: tuple[float, float] = (0.3, 10 / 3),
    ) -> None:
        self.probability, self.scale, self.ratio = probability, scale, ratio

    def __call__(self, picture: Tensor) -> Tensor:
        """The picture, perhaps with noise in it."""
        if torch.rand(()) >= self.probability:
            return picture
        top, left, height, width, _ = RandomErasing.get_params(picture, self.scale, self.ratio, [0.0])
        if (height, width) == picture.shape[-2:]:  # no rectangle was found to fit
            return picture
        mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        noise = torch.randn(3, height, width) * std + mean
        erased = picture.clone()
        erased[:, top : top + height, left : left + width] = noise.clamp(0, 255)
        return erased


class Item(NamedTuple):
    """A picture before it is decoded.

    Attributes:
        name: what an error calls it.
        picture: its file, the file's content, or the opened picture.
        target: class index; None without labels.
    """

    name: str
    picture: Path | bytes | Image.Image
    target: int | None


class Source(Protocol):
    """Where pictures come from. One that cannot be had raises UserError naming it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


class Files:
    """Picture files beneath a folder.

    Args:
        folder: where the paths begin.
        paths: of the pictures, relative to the folder.
        targets: `(N,)` class index of each; None where there are no labels.
    """

    def __init__(self, folder: Path, paths: Sequence[str], targets: np.ndarray | None) -> None:
        self.folder = folder
        # one block of bytes each: loader processes would copy a list of objects page by page
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.targets = targets

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        path = self.folder / os.fsdecode(bytes(self.paths[index]))
        return Item(str(path), path, None if self.targets is None else int(self.targets[index]))


class Part:
    """The samples of a source at some places.

    Args:
        source: all of them.
        places: `(N,)` int64.
    """

    def __init__(self, source: Source, places: np.ndarray) -> None:
        self.source, self.places = source, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Item:
        return self.source[int(self.places[index])]


def held_out(
    source: Source, targets: np.ndarray | None, fraction: float, where: str
) -> tuple[Part, Part, tuple[str, ...]]:
    """A part to train on, a part to test on as `hold_out` draws it, and a note that says so."""
    train, test = hold_out(len(source), fraction, targets)
    note = f"no test split in '{where}': {len(test)} of its {len(source)} pictures held out as one"
    return Part(source, train), Part(source, test), (note,)


class Pictures:
    """Map-style samples `(image (3, H, W) uint8, class index)`, or the image alone without labels.

    An unreadable picture is reported once and the next readable one takes its place, always the same.

    Args:
        source: the pictures.
        transform: from an RGB picture to a tensor.
        max_corrupt: how many unreadable ones are put up with.
        at_least: pixels that the sides must keep, see `decode`.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], Tensor],
        max_corrupt: int = 0,
        at_least: int | None = None,
    ) -> None:
        self.source, self.transform = source, transform
        self.max_corrupt, self.at_least = max_corrupt, at_least
        # in shared memory, so that the loader's processes count together
        self._corrupt = torch.zeros(len(source), dtype=torch.bool)
        self._corrupt.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        """One sample.

        Raises:
            UserError: more than `max_corrupt` pictures cannot be read; the last one is named.
        """
        for place in (*range(index, len(self)), *range(index)):
            if self._corrupt[place]:
                continue
            try:
                return self.sample(place)
            except UserError as error:
                self._put_up_with(place, error)
        raise UserError("not one of the pictures can be read")

    def sample(self, place: int) -> Any:
        """The sample at a place; UserError where it cannot be read."""
        name, picture, target = self.source[place]
        image = self.transform(decode(picture, name, self.at_least))
        return image if target is None else (image, target)

    def _put_up_with(self, place: int, error: UserError) -> None:
        self._corrupt[place] = True
        count = int(self._corrupt.sum())
        if count > self.max_corrupt:
            raise UserError(
                f"{error}; mend or remove it, or skip such files: data.max_corrupt={count} or more"
            ) from error
        warnings.warn(f"{error}; skipped ({count} of at most {self.max_corrupt})", stacklevel=2)
