"""Models of the CIFAR-100 literature for pictures of 32x32 pixels: `cifar/resnet8x4`, `cifar/wrn_40_2`.

Widths, depths and shortcuts are those of the models that published distillation results refer to,
parameter for parameter; weights of others have other names.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from diffkd.errors import UserError, nearest
from diffkd.models.base import Classifier, conv_norm


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, as in ResNet-18.

    Args:
        inputs, outputs: channels.
        stride: of the first convolution and of the shortcut.
    """

    expansion = 1

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_norm(inputs, outputs, 3, stride), nn.ReLU(), *conv_norm(outputs, outputs, 3)
        )
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, H, W)` to `(B, outputs, H / stride, W / stride)`."""
        return torch.relu(self.body(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut, as in ResNet-50.

    Args:
        inputs: channels.
        width: of the 3x3 convolution; the output has four times as many channels.
        stride: of the 3x3 convolution and of the shortcut.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_norm(inputs, width, 1),
            nn.ReLU(),
            *conv_norm(width, width, 3, stride),
            nn.ReLU(),
            *conv_norm(width, 4 * width, 1),
        )
        self.shortcut = _shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, H, W)` to `(B, 4 * width, H / stride, W / stride)`."""
        return torch.relu(self.body(x) + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """A block of the wide residual networks: normalisation and ReLU come before each convolution.

    Args:
        inputs, outputs: channels.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.body = nn.Sequential(
            *conv_norm(inputs, outputs, 3, stride),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, H, W)` to `(B, outputs, H / stride, W / stride)`."""
        activated = self.before(x)
        through: Tensor = x if self.shortcut is None else self.shortcut(activated)
        return through + self.body(activated)  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen, filter each channel, narrow.

    Args:
        inputs, outputs: channels.
        stride: of the depthwise convolution.
        widening: by how much the middle is wider.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, widening: int) -> None:
        super().__init__()
        middle = inputs * widening
        self.residual = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            *conv_norm(inputs, middle, 1),
            nn.ReLU(),
            *conv_norm(middle, middle, 3, stride, groups=middle),
            nn.ReLU(),
            *conv_norm(middle, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, H, W)` to `(B, outputs, H / stride, W / stride)`."""
        out: Tensor = self.body(x)
        return out + x if self.residual else out


class ShuffleBlock(nn.Module):
    """ShuffleNet's block: grouped 1x1 convolutions with a shuffle in between.

    Args:
        inputs, outputs: channels; at stride 2 the pooled input makes up part of the output.
        stride: of the depthwise convolution.
        groups: of the 1x1 convolutions.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 3) -> None:
        super().__init__()
        self.stride = stride
        made = outputs - (inputs if stride == 2 else 0)
        middle = made // 4
        first = 1 if inputs == 24 else groups
        self.narrow = nn.Sequential(*conv_norm(inputs, middle, 1, groups=first), nn.ReLU(), Shuffle(first))
        self.widen = nn.Sequential(
            *conv_norm(middle, middle, 3, stride, groups=middle),
            nn.ReLU(),
            *conv_norm(middle, made, 1, groups=groups),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, H, W)` to `(B, outputs, H / stride, W / stride)`."""
        out: Tensor = self.widen(self.narrow(x))
        if self.stride == 1:
            return torch.relu(out + x)
        return torch.relu(torch.cat([out, nn.functional.avg_pool2d(x, 3, 2, 1)], 1))


class Shuffle(nn.Module):
    """Deals the channels of each group out over all groups.

    Args:
        groups: their number.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)`, the channels in another order."""
        batch, channels, height, width = x.shape
        groups = x.view(batch, self.groups, channels // self.groups, height, width)
        return groups.transpose(1, 2).reshape(batch, channels, height, width)


class SplitBlock(nn.Module):
    """ShuffleNetV2's block: half of the channels pass through, or at stride 2 all go both ways.

    Args:
        inputs, outputs: channels.
        stride: of the depthwise convolutions.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half, self.stride = outputs // 2, stride
        self.right = nn.Sequential(
            *conv_norm(inputs if stride == 2 else half, half, 1),
            nn.ReLU(),
            *conv_norm(half, half, 3, stride, groups=half),
            *conv_norm(half, half, 1),
            nn.ReLU(),
        )
        self.left = nn.Sequential()
        if stride == 2:
            depthwise = conv_norm(inputs, inputs, 3, 2, groups=inputs)
            self.left = nn.Sequential(*depthwise, *conv_norm(inputs, half, 1), nn.ReLU())
        self.shuffle = Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, H, W)` to `(B, outputs, H / stride, W / stride)`."""
        left, right = (x, x) if self.stride == 2 else x.chunk(2, 1)
        out: Tensor = self.shuffle(torch.cat([self.left(left), self.right(right)], 1))
        return out


Block = Callable[[int, int, int], nn.Module]


def _stage(block: Block, inputs: int, outputs: int, stride: int, count: int, grown: int = 1) -> nn.Module:
    """So many blocks, the first of which strides; `grown` times `outputs` is what a block gives."""
    first = block(inputs, outputs, stride)
    return nn.Sequential(first, *(block(grown * outputs, outputs, 1) for _ in range(count - 1)))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(*conv_norm(inputs, outputs, 1, stride))


def _resnet(depth: int, widths: tuple[int, ...], channels: int, classes: int) -> nn.Module:
    """Three stages of basic blocks (He et al., CVPR 2016, section 4.2), with 1x1 shortcuts."""
    stem = nn.Sequential(*conv_norm(channels, widths[0], 3), nn.ReLU())
    stages = [
        _stage(BasicBlock, widths[i], widths[i + 1], 1 if i == 0 else 2, (depth - 2) // 6) for i in range(3)
    ]
    return _settled(Classifier([stem, *stages], widths[-1], classes))


def _large_resnet(
    block: type[BasicBlock] | type[Bottleneck], counts: tuple[int, ...], channels: int, classes: int
) -> nn.Module:
    """ImageNet's four stages behind a stem of one 3x3 convolution."""
    stages: list[nn.Module] = [nn.Sequential(*conv_norm(channels, 64, 3), nn.ReLU())]
    inputs, grown = 64, block.expansion
    for width, count in zip((64, 128, 256, 512), counts, strict=True):
        stages.append(_stage(block, inputs, width, 1 if width == 64 else 2, count, grown))
        inputs = width * grown
    return _settled(Classifier(stages, inputs, classes))


def _wide_resnet(depth: int, factor: int, channels: int, classes: int) -> nn.Module:
    """Wide residual networks (Zagoruyko and Komodakis, BMVC 2016)."""
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
    stages = [
        _stage(PreActivationBlock, widths[i], widths[i + 1], 1 if i == 0 else 2, (depth - 4) // 6)
        for i in range(3)
    ]
    final = nn.Sequential(nn.BatchNorm2d(widths[3]), nn.ReLU())
    return _settled(Classifier([stem, *stages, final], widths[3], classes), head_bias=False)


def _vgg(counts: tuple[int, ...], channels: int, classes: int, large: bool) -> nn.Module:
    """VGG with BatchNorm and one linear layer behind its five stages.

    Only large pictures are halved before the last stage: its map is 4x4 for 32 and for 64 pixels.
    """
    stages, inputs = [], channels
    for i, (width, count) in enumerate(zip((64, 128, 256, 512, 512), counts, strict=True)):
        layers: list[nn.Module] = []
        if i > 0:
            layers.append(nn.MaxPool2d(2) if i < 4 or large else nn.Identity())
        for _ in range(count):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        stages.append(nn.Sequential(*layers))
    return _settled(Classifier(stages, 512, classes), head_bias=False, head_std=0.01)


def _mobilenetv2(channels: int, classes: int) -> nn.Module:
    """MobileNetV2 of half the width (Sandler et al., CVPR 2018)."""
    stages: list[nn.Module] = [nn.Sequential(*conv_norm(channels, 16, 3, 2), nn.ReLU())]
    inputs = 16
    plan = (
        (1, 8, 1, 1),
        (6, 12, 2, 1),
        (6, 16, 3, 2),
        (6, 32, 4, 2),
        (6, 48, 3, 1),
        (6, 80, 3, 2),
        (6, 160, 1, 1),
    )
    for widening, width, count, stride in plan:
        block = partial(InvertedResidual, widening=widening)
        stages.append(_stage(block, inputs, width, stride, count))
        inputs = width
    final = nn.Sequential(*conv_norm(inputs, 1280, 1), nn.ReLU())
    return _settled(Classifier([*stages, final], 1280, classes), head_bias=False, head_std=0.01)


def _shufflenetv1(channels: int, classes: int) -> nn.Module:
    """ShuffleNet with three groups (Zhang et al., CVPR 2018)."""
    stem = nn.Sequential(*conv_norm(channels, 24, 1), nn.ReLU())
    widths = (24, 240, 480, 960)
    stages = [_stage(ShuffleBlock, widths[i], widths[i + 1], 2, (4, 8, 4)[i]) for i in range(3)]
    return Classifier([stem, *stages], 960, classes)


def _shufflenetv2(channels: int, classes: int) -> nn.Module:
    """ShuffleNetV2 (Ma et al., ECCV 2018)."""
    stem = nn.Sequential(*conv_norm(channels, 24, 1), nn.ReLU())
    widths = (24, 116, 232, 464)
    stages = [_stage(SplitBlock, widths[i], widths[i + 1], 2, (4, 8, 4)[i]) for i in range(3)]
    final = nn.Sequential(*conv_norm(464, 1024, 1), nn.ReLU())
    return Classifier([stem, *stages, final], 1024, classes)


def _settled(model: Classifier, head_bias: bool = True, head_std: float | None = None) -> Classifier:
    """He's initialisation of the convolutions; the head's bias and weights as published.

    Args:
        model: with fresh weights.
        head_bias: whether the head's bias keeps its fresh values; else it starts at 0.
        head_std: of the head's normally distributed weights; None keeps the fresh ones.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if not head_bias:
        nn.init.zeros_(model.head.bias)
    if head_std is not None:
        nn.init.normal_(model.head.weight, std=head_std)
    return model


_NARROW, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
_VGG = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
_MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    **{f"resnet{d}": partial(_resnet, d, _NARROW) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{d}x4": partial(_resnet, d, _WIDE) for d in (8, 32)},
    **{f"wrn_{d}_{w}": partial(_wide_resnet, d, w) for d in (16, 40) for w in (1, 2)},
    "mobilenetv2": _mobilenetv2,
    "shufflenetv1": _shufflenetv1,
    "shufflenetv2": _shufflenetv2,
    "resnet18": partial(_large_resnet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(_large_resnet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(_large_resnet, Bottleneck, (3, 4, 6, 3)),
}


def build(
    name: str, *, in_channels: int = 3, image_size: tuple[int, ...] = (32, 32), num_classes: int = 100
) -> nn.Module:
    """A model of the zoo with fresh weights; its pictures `(B, in_channels, H, W)` may be of any size.

    Args:
        name: one of `names()`.
        in_channels: of the pictures.
        image_size: `(H, W)` of the pictures; from 64x64 up VGG halves them once more.
        num_classes: size of the logits `(B, num_classes)`.

    Raises:
        UserError: there is no such model; the nearest names are given.

    >>> model = build("resnet8x4")
    >>> sum(p.numel() for p in model.parameters()), model(torch.rand(2, 3, 32, 32)).shape
    (1233540, torch.Size([2, 100]))
    """
    if name in _VGG:
        return _vgg(_VGG[name], in_channels, num_classes, large=min(image_size) >= 64)
    if name not in _MODELS:
        raise UserError(f"unknown model 'cifar/{name}'{nearest(name, names())}")
    return _MODELS[name](in_channels, num_classes)


def names() -> list[str]:
    """All of them."""
    return [*_MODELS, *_VGG]
