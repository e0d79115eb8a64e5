"""Answers drawn on pictures: colours of classes, label maps, boxes."""

import colorsys
from collections.abc import Sequence
from functools import cache

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes


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
        draw.text((28, top + 2), f"{number} {name}", fill="black", font=words)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def draw_boxes(
    image: Tensor, boxes: Tensor, labels: Tensor, names: Sequence[str], scores: Tensor | None = None
) -> Tensor:
    """A picture `(3, H, W)` uint8 with boxes on it, each with its class and, where there is one, its score.

    Args:
        image: `(1, H, W)` or `(3, H, W)` uint8.
        boxes: `(n, 4)`: left, top, right, bottom in pixels of the picture.
        labels: `(n,)` from 0.
        names: of the classes.
        scores: `(n,)`.

    >>> black = torch.zeros(3, 16, 16, dtype=torch.uint8)
    >>> draw_boxes(black, torch.tensor([[2.0, 2, 9, 9]]), torch.tensor([0]), ["a"])[:, 2, 2].tolist()
    [245, 61, 61]
    """
    image = image.cpu().expand(3, -1, -1)
    if not len(boxes):
        return image
    words = [names[label] for label in labels.tolist()]
    if scores is not None:
        words = [f"{word} {score:.2f}" for word, score in zip(words, scores.tolist(), strict=True)]
    drawn: Tensor = draw_bounding_boxes(
        image,
        boxes.cpu(),
        words,
        [_bright(label) for label in labels.tolist()],
        width=2,
        fill_labels=True,
    )
    return drawn


def picture_of(image: Tensor) -> Image.Image:
    """`(3, H, W)` uint8 as a picture."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _bright(label: int) -> tuple[int, ...]:
    """A colour that is seen on dark pictures and under black words, far from those of the classes before."""
    return tuple(round(255 * part) for part in colorsys.hls_to_rgb(label * 0.618034 % 1, 0.6, 0.9))
