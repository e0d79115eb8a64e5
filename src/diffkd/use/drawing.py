"""Answers drawn on pictures: colours of classes, label maps, boxes."""

import colorsys
from collections.abc import Sequence
from functools import cache

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffkd.errors import plain


def palette(count: int) -> Tensor:
    """`(count, 3)` uint8: black, then colours far apart; the same for the same class everywhere.

    Bits of the class's number go to the high bits of red, green and blue in turn, as PASCAL VOC colours
    its classes.

    >>> palette(3).tolist()
    [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    classes = torch.arange(count)
    colours = torch.zeros(count, 3, dtype=torch.long)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (classes >> (3 * bit + channel) & 1) << (7 - bit)
    return colours.to(torch.uint8)


def rgb(image: Tensor) -> Tensor:
    """A loader's picture `(C, H, W)`, uint8 or 0 to 1, as `(3, H, W)` uint8 on the CPU."""
    image = image.detach().cpu()
    if image.is_floating_point():
        image = (image * 255).round().clamp(0, 255).to(torch.uint8)
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def overlay(image: Tensor, labels: Tensor, colours: Tensor) -> Tensor:
    """A picture `(3, H, W)` uint8 under the colours of its label map `(H, W)`, half and half."""
    tint = colours[labels.long()].permute(2, 0, 1)
    return (0.5 * image.float() + 0.5 * tint.float()).to(torch.uint8)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings along: it has more scripts than Pillow's own."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def legend(names: Sequence[str]) -> Tensor:
    """What the colours of classes mean: a line for each, its colour, its number and its name.

    >>> legend(["sky", "road"])[:, 26, 6].tolist()
    [128, 0, 0]
    """
    height, words = 20, font(12)
    width = 36 + max((round(words.getlength(f"{i} {name}")) for i, name in enumerate(names)), default=0)
    picture = Image.new("RGB", (width, height * max(len(names), 1)), "white")
    draw = ImageDraw.Draw(picture)
    for number, (name, colour) in enumerate(zip(names, palette(len(names)).tolist(), strict=True)):
        top = height * number
        draw.rectangle((4, top + 3, 22, top + 16), fill=tuple(colour))
        draw.text((28, top + 2), plain(f"{number} {name}"), fill="black", font=words)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def draw_boxes(
    picture: Image.Image,
    boxes: Tensor,
    labels: Tensor,
    names: Sequence[str],
    scores: Tensor | None = None,
    *,
    origin: tuple[int, int] | None = None,
    sides: tuple[int, int] = (240, 640),
) -> Tensor:
    """A picture with boxes on it, each with its class and, where there is one, its score: `(3, H, W)` uint8.

    It is shown at a size at which words can be read. Words stay off each other: of boxes in a crowd the
    surest are named, the others have the colour of their class alone.

    Args:
        picture: to draw on a copy of.
        boxes: `(n, 4)`: left, top, right, bottom.
        labels: `(n,)` from 0.
        names: of the classes.
        scores: `(n,)`.
        origin: `(H, W)` in pixels of which the boxes are; None: of the picture.
        sides: pixels that the shorter side has at least, and the longer one at most.

    >>> black = Image.new("RGB", (240, 240))
    >>> draw_boxes(black, torch.tensor([[2.0, 2, 99, 99]]), torch.tensor([0]), ["a"])[:, 99, 50].tolist()
    [245, 61, 61]
    """
    height, width = origin or (picture.height, picture.width)
    canvas = _legible(picture, sides)
    scale = torch.tensor([canvas.width / width, canvas.height / height] * 2)
    order = range(len(boxes)) if scores is None else scores.argsort(descending=True, stable=True).tolist()
    found = [(whole, int(labels[i]), i) for i in order for whole in [(boxes[i].cpu() * scale).tolist()]]
    pen, words = ImageDraw.Draw(canvas), font(max(10, max(canvas.size) // 64))
    for (left, top, right, bottom), label, _ in reversed(found):
        edges = left, top, max(left, right), max(top, bottom)
        pen.rectangle(edges, outline=_bright(label), width=max(1, max(canvas.size) // 320))
    taken: list[tuple[float, float, float, float]] = []
    for (left, top, _, bottom), label, i in found:
        word = plain(names[label] if scores is None else f"{names[label]} {float(scores[i]):.2f}")
        across, down = words.getlength(word) + 4, words.size + 3
        x = min(max(left, 0), max(canvas.width - across, 0))
        for y in (top - down, top, bottom):
            place = x, y, x + across, y + down
            if 0 <= y <= canvas.height - down and not any(_meet(place, other) for other in taken):
                pen.rectangle(place, fill=_bright(label))
                pen.text((x + 2, y + down / 2), word, "black", words, anchor="lm")
                taken.append(place)
                break
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def _legible(picture: Image.Image, sides: tuple[int, int]) -> Image.Image:
    """A copy of a picture, enlarged or shrunk to sides of at least and of at most so many pixels."""
    factor = max(sides[0] / min(picture.size), 1.0)
    factor = min(factor, sides[1] / max(picture.size))
    if factor == 1:
        return picture.convert("RGB")
    how = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BILINEAR
    size = max(round(picture.width * factor), 1), max(round(picture.height * factor), 1)
    return picture.convert("RGB").resize(size, how)


def _meet(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def picture_of(image: Tensor) -> Image.Image:
    """`(3, H, W)` uint8 as a picture."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _bright(label: int) -> tuple[int, ...]:
    """A colour that is seen on dark pictures and under black words, far from those of the classes before."""
    return tuple(round(255 * part) for part in colorsys.hls_to_rgb(label * 0.618034 % 1, 0.6, 0.9))
