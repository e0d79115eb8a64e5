"""Colours of classes."""

import torch
from torch import Tensor


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
