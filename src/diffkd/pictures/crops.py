"""Random views of pictures to train on: what is seen is drawn first, so that no more of it is decoded."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from diffkd.pictures.decoding import (
    LYING,
    MAX_PIXELS,
    as_rgb,
    content_of,
    opened,
    shrink,
    turned,
    unreadable,
)

_TRIES = 10


class Crop(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def scaled(self, down: float, across: float) -> "Crop":
        """The same part of the picture at so many times its height and its width.

        >>> Crop(10, 20, 31, 41).scaled(0.5, 0.25)
        Crop(top=5, left=5, height=15, width=10)
        """
        top, left = int(self.top * down), int(self.left * across)
        bottom, right = round((self.top + self.height) * down), round((self.left + self.width) * across)
        return Crop(top, left, max(bottom - top, 1), max(right - left, 1))


class RandomView:
    """A random part of a picture brought to one size, perhaps mirrored (arXiv 1409.4842).

    Args:
        size: height and width of the view in pixels.
        scale: the smallest and the largest share of the area that is shown; None shows all of it,
            whatever its proportions.
        ratio: the least and the largest width of the part by its height.
        flip: mirrors left and right, every second picture on average.
        interpolation: "bilinear" or "bicubic".
        then: further changes of the view, from `(3, size, size)` uint8 to the same.

    >>> view = RandomView(8, scale=(0.08, 1.0))
    >>> view(Image.new("RGB", (40, 30))).shape
    torch.Size([3, 8, 8])
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] | None,
        *,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        interpolation: str = "bilinear",
        then: Sequence[Callable[[Tensor], Tensor]] = (),
    ) -> None:
        self.size, self.scale, self.ratio, self.flip = size, scale, ratio, flip
        self.interpolation, self.then = interpolation, then

    def __call__(self, picture: Path | bytes | Image.Image, name: str = "picture", **decoding: Any) -> Tensor:
        """`(3, size, size)` uint8 of a file, its content, or an opened picture; see `decode_crop`."""
        from torchvision.transforms import InterpolationMode  # it takes seconds: not before it is needed
        from torchvision.transforms.v2 import functional as v2

        numbers: list[float] = torch.rand(2 * _TRIES + 3).tolist()
        part = decode_crop(picture, name, lambda h, w: self.crop(h, w, numbers), self.size, **decoding)
        mode = InterpolationMode(self.interpolation)
        view: Tensor = v2.resize_image(part, [self.size, self.size], mode, antialias=True)
        if self.flip and numbers[-1] < 0.5:
            view = view.flip(-1)
        for step in self.then:
            view = step(view)
        return view

    def crop(self, height: int, width: int, numbers: Sequence[float]) -> Crop:
        """The part to be seen of a picture of so many pixels.

        Args:
            height: of the picture.
            width: of the picture.
            numbers: 22 or more that are drawn evenly from 0 to 1.
        """
        if self.scale is None:
            return Crop(0, 0, height, width)
        (least, most), shapes = self.scale, tuple(map(math.log, self.ratio))
        for share, shape in zip(numbers[2::2], numbers[3::2], strict=False):
            area = height * width * (least + (most - least) * share)
            ratio = math.exp(shapes[0] + (shapes[1] - shapes[0]) * shape)
            rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < rows <= height and 0 < columns <= width:
                top, left = int(numbers[0] * (height - rows + 1)), int(numbers[1] * (width - columns + 1))
                return Crop(top, left, rows, columns)
        rows = min(height, max(round(width / self.ratio[0]), 1))
        columns = min(width, max(round(height * self.ratio[1]), 1))
        return Crop((height - rows) // 2, (width - columns) // 2, rows, columns)


def decode_crop(
    picture: Path | bytes | Image.Image,
    name: str,
    choose: Callable[[int, int], Crop],
    at_least: int,
    *,
    levels: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """A part of a picture, `(3, h, w)` uint8, otherwise as `decode` gives it.

    Args:
        picture: a file, its content, or a picture opened already.
        name: what an error calls it.
        choose: the part, of so many rows and columns; it is asked before anything is decoded.
        at_least: pixels that the part's sides must keep where a JPEG may be decoded at a half, a
            quarter or an eighth of its size, which takes a fraction of the time.
        levels: see `decode`.
        max_pixels: see `decode`.

    Raises:
        UserError: as `decode`.
    """
    try:
        if isinstance(picture, Image.Image):
            return _part(as_rgb(picture, levels), choose)
        content = content_of(picture)
        with opened(content) as found:
            if not isinstance(found, JpegImageFile):
                shrink(found, 1, max_pixels)
                return _part(as_rgb(found, levels), choose)
            way = turned(found)
            size = (found.width, found.height) if way in LYING else (found.height, found.width)
            crop = choose(*size)
            whole = shrink(found, min(crop.height, crop.width) // at_least, max_pixels) == 1
            if whole and way == 1 and (jpeg := _decoded_jpeg(found, content)) is not None:
                return jpeg[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
            rgb = as_rgb(found, levels)
            return _part(rgb, lambda *now: crop.scaled(now[0] / size[0], now[1] / size[1]))
    except Exception as error:
        raise unreadable(name, error) from error


def _decoded_jpeg(picture: Image.Image, content: bytes) -> Tensor | None:
    """A JPEG `(3, H, W)` uint8 as torchvision decodes it, the same pixels; None where Pillow must.

    A Pillow picture would take half as long again on its way to a tensor.
    """
    if picture.format != "JPEG" or picture.mode not in ("L", "RGB"):
        return None
    if content.rfind(b"\xff\xd9") < 0:  # cut short, of which torchvision would complain on its own
        return None
    try:
        from torchvision import io

        # the operator itself: what torchvision puts around it warns at every call that it will go one day
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        found: Tensor = torch.ops.image.decode_jpeg(data, io.ImageReadMode.RGB.value)
    except (ImportError, AttributeError, RuntimeError):  # it has none, or the file is damaged
        return None
    return found


def _part(picture: Image.Image, choose: Callable[[int, int], Crop]) -> Tensor:
    """A part `(3, h, w)` of an RGB picture."""
    crop = choose(picture.height, picture.width)
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    return torch.from_numpy(np.array(picture.crop(box))).permute(2, 0, 1)
