"""Small convolutional networks for small pictures: `simple/cnn8` has 8 channels in its first stage."""

import re

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
    """`cnnW` for any width W.

    Raises:
        UserError: the name is not of that form.
    """
    match = re.fullmatch(r"cnn([1-9]\d{0,3})", name)
    if match is None:
        raise UserError(f"unknown model 'simple/{name}'; write simple/cnn8, or another width")
    return SimpleCNN(int(match[1]), in_channels, num_classes)


def names() -> list[str]:
    """Some of them."""
    return ["cnn4", "cnn8", "cnn16", "cnn32", "cnn64"]
