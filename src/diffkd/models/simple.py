"""Small convolutional networks for small pictures: `simple/cnn8` has 8 channels in its first stage.

`simple/unet8` gives one class per pixel.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.errors import UserError


class SimpleCNN(nn.Module):
    """Three stages of two convolutions, each stage at half the size and twice the width.

    Args:
        width: channels of the first stage.
        in_channels: of the pictures `(B, in_channels, H, W)`, from 4x4 pixels up.
        num_classes: size of the logits `(B, num_classes)`.

    >>> import torch
    >>> SimpleCNN(8, 1, 10)(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, width: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stage1 = _stage(in_channels, width, 1)
        self.stage2 = _stage(width, 2 * width, 2)
        self.stage3 = _stage(2 * width, 4 * width, 2)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        features = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class SimpleUNet(nn.Module):
    """Three stages that halve the size and double the width, and two back up that see the way down too.

    Args:
        width: channels of the first stage.
        in_channels: of the pictures `(B, in_channels, H, W)`, from 8x8 pixels up.
        num_classes: of the logits `(B, num_classes, H / 2, W / 2)`.

    >>> SimpleUNet(4, 3, 5)(torch.rand(2, 3, 16, 24)).shape
    torch.Size([2, 5, 8, 12])
    """

    def __init__(self, width: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        widths = [in_channels, width, 2 * width, 4 * width]
        self.encoder = nn.ModuleList(_stage(a, b, 2) for a, b in pairwise(widths))
        self.decoder = _Decoder(widths[1:])
        self.segmentation_head = nn.Sequential(nn.Conv2d(width, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        features = []
        for stage in self.encoder:
            x = stage(x)
            features.append(x)
        logits: Tensor = self.segmentation_head(self.decoder(features))
        return logits


class _Decoder(nn.Module):
    """From the maps of all stages, shallow to deep, to one map at the first one's size and width."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(_stage(a + b, a, 1) for a, b in pairwise(widths))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = features[-1]
        for stage, skip in zip(reversed(self.stages), reversed(features[:-1]), strict=True):
            x = stage(torch.cat([skip, F.interpolate(x, skip.shape[-2:])], 1))
        return x


def _stage(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def build(
    name: str, *, in_channels: int = 3, image_size: tuple[int, ...] = (32, 32), num_classes: int = 10
) -> nn.Module:
    """`cnnW` to classify and `unetW` to segment, for any width W.

    Raises:
        UserError: the name is not of that form.
    """
    match = re.fullmatch(r"(cnn|unet)([1-9]\d{0,3})", name)
    if match is None:
        raise UserError(f"unknown model 'simple/{name}'; write simple/cnn8 or simple/unet8, or another width")
    kind = SimpleCNN if match[1] == "cnn" else SimpleUNet
    return kind(int(match[2]), in_channels, num_classes)


def names() -> list[str]:
    """Some of them."""
    return ["cnn4", "cnn8", "cnn16", "cnn32", "cnn64", "unet4", "unet8", "unet16", "unet32"]
