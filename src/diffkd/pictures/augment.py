"""How picture files are cropped, augmented and brought to one size, one by one."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment as timm_augment
from torch import Tensor
from torchvision.transforms import RandomErasing
from torchvision.transforms import v2 as transforms

from diffkd.errors import UserError, nearest
from diffkd.pictures.crops import RandomView
from diffkd.pictures.decoding import MAX_PIXELS
from diffkd.pictures.files import IMAGENET_MEAN, IMAGENET_STD, Pictures, Source
from diffkd.pictures.look import Looked, look_over
from diffkd.pictures.view import TestView

_LARGEST_SIDE = 16384
_SMALL, _MOST_KEPT = 64, 2**31  # pixels of a side, bytes in all
_FAR = 0.6  # of the training size: what is smaller is enlarged to no use
_NAMED_POLICIES = {"randaugment": "rand-m9-mstd0.5", "autoaugment": "original-mstd0.5"}
_OWN_POLICIES = ("none", "crop", "light", "trivial")
_TIMM_POLICY = re.compile(
    r"rand(-(m|n|p|mstd|inc|mmax)[\d.]+|-t[a-z0-9]+)*|(original|originalr|v0|v0r|3a)(-mstd[\d.]+)?"
)


@dataclass(frozen=True)
class PictureOptions:
    """How pictures are augmented, one by one in the loader's processes.

    Attributes:
        image_size: height and width in pixels that every picture is brought to; 224 if not given, but
            small pictures of one size (at most 64 pixels) are then kept in memory as they are, and
            augmented as those of CIFAR are: `augment="crop"`.
        augment: "none"; "light" (random resized crop), the default; "crop" (random crop after padding,
            for small pictures); or "light" followed by "randaugment" (arXiv 1909.13719),
            "autoaugment" (1805.09501), "trivial" (2103.10158) or a policy that timm knows by a text
            such as "rand-m9-mstd0.5-inc1", "v0" or "3a".
        crop_padding: pixels added on every side before the crop of "crop"; an eighth if not given.
        cutout: side in pixels of a square painted over with the mean colour (arXiv 1708.04552).
        flip: mirror left and right at random; turn it off where that changes the class.
        min_scale: smallest share of the picture that a random resized crop may show.
        random_erasing: probability that a rectangle is painted over with noise (arXiv 1708.04896).
        interpolation: how pictures are resized.
        crop_fraction: share of the picture's shorter side that test pictures show.
        max_corrupt: how many unreadable files of a split are skipped, each with a warning; the next
            one more stops the run.
        max_pixels: larger JPEGs are decoded at a fraction of their size, other formats refused.
        value_range: values of 16-bit pictures that become black and white, where the files do not say
            their depth; found from the training pictures if not given.

    Raises:
        UserError: an option is out of its range, or `augment` unknown.
    """

    image_size: int | None = None
    augment: str | None = None
    crop_padding: int | None = None
    cutout: int = 0
    flip: bool = True
    min_scale: float = 0.08
    random_erasing: float = 0.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    crop_fraction: float = 0.875
    max_corrupt: int = 0
    max_pixels: int = MAX_PIXELS
    value_range: list[int] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.size <= _LARGEST_SIDE:
            raise UserError(f"data.image_size={self.image_size} must be 1 to {_LARGEST_SIDE} pixels")
        if 0 < self.crop_fraction <= 1 and round(self.size / self.crop_fraction) ** 2 > MAX_PIXELS:
            raise UserError(
                f"data.image_size={self.size} with data.crop_fraction={self.crop_fraction} enlarges pictures "
                f"beyond {MAX_PIXELS} pixels; lower the size"
            )
        for name in ("crop_padding", "cutout", "max_corrupt"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"data.{name}={getattr(self, name)} is negative")
        if self.padding > self.size:
            raise UserError(f"data.crop_padding={self.padding} is more than the {self.size} pixels of a side")
        if self.max_pixels < 1:
            raise UserError(f"data.max_pixels={self.max_pixels} must be 1 or more")
        if self.value_range is not None and not _rising(self.value_range):
            raise UserError(f"data.value_range={self.value_range} must be [black, white] within 16 bits")
        for name in ("min_scale", "random_erasing", "crop_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (value == 0 and name != "random_erasing"):
                raise UserError(f"data.{name}={value} must lie between 0 and 1")
        policy = _NAMED_POLICIES.get(self._augment, self._augment)
        if policy not in _OWN_POLICIES and not _TIMM_POLICY.fullmatch(policy):
            known = [*_OWN_POLICIES, *_NAMED_POLICIES, "rand-m9-mstd0.5", "original", "v0", "3a"]
            raise UserError(f"unknown data.augment '{self.augment}'{nearest(self._augment, known)}")
        try:
            self._policy()
        except (ValueError, AssertionError, KeyError) as error:
            raise UserError(f"data.augment '{self.augment}' is no policy that timm knows: {error}") from error

    def train_transform(self) -> Callable[[Image.Image], Tensor] | RandomView:
        """From an RGB picture to a random view of it, `(3, image_size, image_size)` uint8."""
        if self._augment == "none":
            return self.test_transform()
        crop = self._augment == "crop"
        steps: list[Any] = [transforms.RandomCrop(self.size, padding=self.padding)] if crop else []
        steps += [_OnPillow(step) for step in self._policy()]
        steps += [Erase(self.random_erasing)] if self.random_erasing else []
        steps += [_CutOut(self.cutout)] if self.cutout else []
        scale = None if crop else (self.min_scale, 1.0)
        return RandomView(self.size, scale, flip=self.flip, interpolation=self.interpolation, then=steps)

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return 224 if self.image_size is None else self.image_size

    @property
    def padding(self) -> int:
        """Pixels added on every side before a random crop."""
        return max(self.size // 8, 1) if self.crop_padding is None else self.crop_padding

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of every picture."""
        return 3, self.size, self.size

    @property
    def _augment(self) -> str:
        return self.augment or "light"

    def splits(
        self, train: Source, test: Source, levels: tuple[int, int] | None = None
    ) -> tuple[Pictures, Pictures]:
        """Samples to train on, augmented, and to test on; `levels` as for `decode`."""
        common: Any = {"max_corrupt": self.max_corrupt, "max_pixels": self.max_pixels, "levels": levels}
        plain = self.test_transform()
        return (
            Pictures(train, self.train_transform(), plain=plain, **common),
            Pictures(test, plain, leave_out=True, **common),
        )

    def look_over(self, train: Source, test: Source) -> Looked:
        """What some of the pictures tell of all, with `value_range` where it is said."""
        found = look_over(train, test)
        if self.value_range is not None:
            return found._replace(levels=(self.value_range[0], self.value_range[1]), notes=())
        way = "data.value_range=[0,65535] takes all 16 bits"
        return found._replace(notes=tuple(f"{note}; {way}" for note in found.notes))

    def kept_size(self, looked: Looked, count: int) -> tuple[int, int] | None:
        """Height and width of so many pictures if they are to be kept in memory; else None."""
        plain = self.augment in (None, "crop") and not self.random_erasing
        size = looked.size if self.image_size is None and plain else None
        if size is None or max(size) > _SMALL or 3 * count * size[0] * size[1] > _MOST_KEPT:
            return None
        return size

    def enlarged(self, looked: Looked) -> tuple[str, ...]:
        """A note where pictures are trained on at a size far beyond their own, which nobody asked for."""
        height, width = looked.typical or (self.size, self.size)
        if self.image_size is not None or max(height, width) > _FAR * self.size:
            return ()
        times = self.size**2 / (height * width)
        return (
            f"pictures of about {height}x{width} are enlarged to {self.size}x{self.size}, {times:.0f} times "
            f"the pixels and the work; data.image_size={max(height, width)} trains at their own size",
        )

    def read(self, source: Source, levels: tuple[int, int] | None) -> tuple[Tensor, Tensor | None]:
        """All pictures of a source, `(N, 3, H, W)` uint8, and class indices `(N,)`, None without labels.

        Raises:
            UserError: more than `max_corrupt` cannot be read, or one has another size.
        """
        rows = Pictures(
            source, transforms.PILToTensor(), self.max_corrupt, leave_out=True, levels=levels
        ).all()
        if len({row[0].shape for row in rows}) > 1:
            odd = next(i for i, row in enumerate(rows) if row[0].shape != rows[0][0].shape)
            raise UserError(
                f"pictures are not all of one size: '{source[odd].name}' differs; set data.image_size"
            )
        targets = [row[1] for row in rows if row[1] is not None]
        return torch.stack([row[0] for row in rows]), torch.tensor(targets) if targets else None

    @property
    def view(self) -> TestView:
        """Of test pictures: their centre."""
        return TestView("crop", (self.size, self.size), self.crop_fraction, self.interpolation)

    def test_transform(self) -> Callable[[Image.Image], Tensor]:
        """From an RGB picture to its centre, `(3, image_size, image_size)` uint8."""
        return self.view

    @property
    def _mode(self) -> Any:
        return transforms.InterpolationMode(self.interpolation)

    def _policy(self) -> list[Any]:
        """The transform of colours and shapes that `augment` names, if any."""
        if self._augment == "trivial":
            return [transforms.TrivialAugmentWide(interpolation=self._mode)]
        if self._augment in _OWN_POLICIES:
            return []
        text = _NAMED_POLICIES.get(self._augment, self._augment)
        make = (
            timm_augment.rand_augment_transform if text[:4] == "rand" else timm_augment.auto_augment_transform
        )
        settings = {
            "translate_const": int(self.size * 0.45),
            "img_mean": tuple(round(255 * m) for m in IMAGENET_MEAN),
            "interpolation": getattr(Image.Resampling, self.interpolation.upper()),
        }
        return [make(text, settings)]


def _rising(values: Sequence[int]) -> bool:
    return len(values) == 2 and 0 <= values[0] < values[1] <= 65535


class _OnPillow:
    """Changes a `(3, H, W)` uint8 picture as a Pillow picture."""

    def __init__(self, change: Callable[[Image.Image], Image.Image]) -> None:
        self.change = change

    def __call__(self, picture: Tensor) -> Tensor:
        rows = self.change(Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()))
        return torch.from_numpy(np.array(rows)).permute(2, 0, 1)


class _CutOut:
    """Paints a square of a `(3, H, W)` uint8 picture over with ImageNet's mean colour."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, picture: Tensor) -> Tensor:
        starts = [int(torch.randint(n, ())) - self.side // 2 for n in picture.shape[-2:]]
        rows, columns = (slice(max(start, 0), max(start + self.side, 0)) for start in starts)
        painted = picture.clone()
        painted[:, rows, columns] = (255 * torch.tensor(IMAGENET_MEAN)).round().byte().view(3, 1, 1)
        return painted


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
