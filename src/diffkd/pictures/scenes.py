"""Made scenes of real digits: textured grounds, clutter, and digits at any place, size and angle.

Every scene carries what each task wants to know of it: which digits, where they are, which pixels are theirs.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkd.errors import UserError

_CHUNK = 500  # scenes made at once: bounds the memory
_HIDDEN = 0.35  # a digit of which less can be seen counts as clutter


@dataclass(frozen=True)
class SceneOptions:
    """What scenes look like.

    Attributes:
        size: height and width in pixels.
        digits: fewest and most digits in a scene.
        scale: smallest and largest side of a digit, as a share of the picture's.
        clutter: pieces of digits that lie about and mean nothing.
        rotation: largest angle in degrees, either way.
        noise: standard deviation of the pixels' noise, on the scale 0 to 1.
        ground: darkest and brightest mean of a ground, on the scale 0 to 1.
        contrast: least difference in brightness of a digit and its ground, on the scale 0 to 1.

    Raises:
        UserError: an option is out of its range.
    """

    size: int = 32
    digits: tuple[int, int] = (1, 1)
    scale: tuple[float, float] = (0.6, 0.85)
    clutter: int = 2
    rotation: float = 15.0
    noise: float = 0.05
    ground: tuple[float, float] = (0.1, 0.5)
    contrast: float = 0.5

    def __post_init__(self) -> None:
        low, high = self.digits
        if not 0 <= low <= high or high < 1:
            raise UserError(
                f"digits={self.digits}: needs a least and a most number of digits, such as (1, 4)"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale={self.scale}: needs two shares of the picture's side, between 0 and 1")
        for name, least in (("size", 16), ("clutter", 0), ("noise", 0), ("contrast", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: needs at least {least}")


class Scenes(NamedTuple):
    """Scenes and the truth about them; K is the most digits that a scene may have.

    Attributes:
        images: `(N, 3, H, W)` uint8.
        masks: `(N, H, W)` uint8: 0 for the ground and clutter, digit d is d + 1.
        boxes: `(N, K, 4)` float32, left, top, right, bottom in pixels; zeros where there is no digit.
        labels: `(N, K)` int64, the digits; -1 where there is none.
    """

    images: Tensor
    masks: Tensor
    boxes: Tensor
    labels: Tensor


def compose(digits: Tensor, labels: Tensor, count: int, seed: int, options: SceneOptions) -> Scenes:
    """So many scenes out of a stock of digits; one seed gives the same ones.

    Args:
        digits: `(M, h, w)` float, 0 (paper) to 1 (ink).
        labels: `(M,)` int64, which digits they are.
        count: N.
        seed: of all randomness.
        options: what the scenes look like.

    >>> stock = torch.ones(2, 8, 8)
    >>> scenes = compose(stock, torch.tensor([3, 7]), 4, 0, SceneOptions(digits=(2, 2)))
    >>> scenes.images.shape, scenes.labels.shape
    (torch.Size([4, 3, 32, 32]), torch.Size([4, 2]))
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [
        _compose(digits, labels, min(_CHUNK, count - start), generator, options)
        for start in range(0, count, _CHUNK)
    ]
    return Scenes(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _compose(
    digits: Tensor, labels: Tensor, count: int, random: torch.Generator, options: SceneOptions
) -> Scenes:
    size, most = options.size, options.digits[1]
    images, brightness = _grounds(count, options, random)
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    for _ in range(options.clutter):
        ink = _ink(digits[_draw(len(digits), count, random)], random, options, piece=True)
        images = _paint(images, ink, brightness, random, options.contrast)
    chosen = _draw(len(digits), count * most, random).view(count, most)
    there = (
        torch.arange(most) < options.digits[0] + _draw(most - options.digits[0] + 1, count, random)[:, None]
    )
    shapes = []
    for k in range(most):
        ink = _ink(digits[chosen[:, k]], random, options) * there[:, k].view(-1, 1, 1)
        images = _paint(images, ink, brightness, random, options.contrast)
        shape = ink > 0.5
        masks = torch.where(shape, (labels[chosen[:, k]] + 1).to(torch.uint8).view(-1, 1, 1), masks)
        shapes.append(shape)
    masks, boxes, found = _truth(masks, torch.stack(shapes, 1), labels[chosen])
    noisy = images + options.noise * torch.randn(images.shape, generator=random)
    return Scenes((noisy.clamp(0, 1) * 255).round().to(torch.uint8), masks, boxes, found)


def _draw(below: int, count: int, random: torch.Generator) -> Tensor:
    return torch.randint(below, (count,), generator=random)


def _uniform(low: float, high: float, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=random)


def _grounds(count: int, options: SceneOptions, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Textured grounds `(N, 3, H, W)` and their mean brightness `(N, 1, 1, 1)`, 0 to 1."""
    size, brightness = options.size, _uniform(*options.ground, (count, 1, 1, 1), random)
    ground = brightness + _uniform(-0.1, 0.1, (count, 3, 1, 1), random)
    for cells, strength in ((3, 0.15), (size // 3, 0.08)):
        rough = _uniform(-strength, strength, (count, 3, cells, cells), random)
        ground = ground + F.interpolate(rough, (size, size), mode="bicubic", align_corners=False)
    return ground.clamp(0, 1), brightness


def _ink(stock: Tensor, random: torch.Generator, options: SceneOptions, piece: bool = False) -> Tensor:
    """Digits `(N, h, w)`, or pieces of them, put anywhere: how opaque each pixel is, `(N, H, W)`."""
    count, size = len(stock), options.size
    scale = _uniform(*options.scale, (count,), random)
    angle = _uniform(-options.rotation, options.rotation, (count,), random) * (math.pi / 180)
    if piece:
        angle = _uniform(-math.pi, math.pi, (count,), random)
    centre = _uniform(-1, 1, (count, 2), random) * (1 - 0.8 * scale[:, None])
    # The grid leads from a pixel of the picture to the place in the digit that is seen there.
    cos, sin = angle.cos() / scale, angle.sin() / scale
    turn = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    shift = -(turn @ centre[:, :, None])
    grid = F.affine_grid(torch.cat([turn, shift], 2), [count, 1, size, size], align_corners=False)
    seen = F.grid_sample(stock[:, None].float(), grid, align_corners=False)[:, 0]
    ink = ((seen - 0.3) / 0.25).clamp(0, 1)
    if piece:  # what lies on one side of a line through the digit
        way = _uniform(-math.pi, math.pi, (count, 1, 1), random)
        side = grid[..., 0] * way.cos() + grid[..., 1] * way.sin() > _uniform(
            -0.1, 0.3, (count, 1, 1), random
        )
        ink = ink * side
    return ink


def _paint(
    images: Tensor, ink: Tensor, brightness: Tensor, random: torch.Generator, contrast: float
) -> Tensor:
    """The pictures with ink of a random colour that differs from the ground's brightness."""
    away = torch.where(brightness < 0.5, 1.0, -1.0)
    shade = brightness + away * _uniform(contrast, contrast + 0.3, brightness.shape, random)
    colour = (shade + _uniform(-0.15, 0.15, (len(images), 3, 1, 1), random)).clamp(0, 1)
    return torch.lerp(images, colour.expand_as(images), ink[:, None].expand_as(images))


def _truth(masks: Tensor, shapes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masks, boxes `(N, K, 4)` of whole digits and their labels, hidden ones left out.

    Args:
        masks: `(N, H, W)` of what is on top.
        shapes: `(N, K, H, W)` bool, every digit's pixels, hidden or not, the last one on top.
        labels: `(N, K)`.
    """
    above = shapes.flip(1).cumsum(1).flip(1) - shapes.long()  # later digits over this one
    visible = shapes & (above == 0)
    area = shapes.sum((2, 3))
    shown = (visible.sum((2, 3)) > _HIDDEN * area) & (area > 0)
    masks = masks.masked_fill((visible & ~shown[:, :, None, None]).any(1), 0)
    edges = []
    for axis in (2, 3):  # columns, then rows
        line = shapes.any(axis)
        places = torch.arange(line.shape[2], dtype=torch.float32)
        edges.append((places.masked_fill(~line, math.inf).amin(2), places.masked_fill(~line, -1).amax(2) + 1))
    (left, right), (top, bottom) = edges
    boxes = torch.stack([left, top, right, bottom], 2).masked_fill(~shown[:, :, None], 0)
    return masks, boxes, labels.masked_fill(~shown, -1)
