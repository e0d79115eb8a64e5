"""Models of the ImageNet literature that timm and torchvision lack: `imagenet/mobilenetv1`."""

from torch import nn

from diffkd.errors import UserError, nearest
from diffkd.models.base import Classifier, conv_norm

# Width and stride of each block of MobileNet (Howard et al., 2017, arXiv 1704.04861, table 1).
_STAGES = (
    ((64, 1),),
    ((128, 2), (128, 1)),
    ((256, 2), (256, 1)),
    ((512, 2), *((512, 1),) * 5),
    ((1024, 2), (1024, 1)),
)


def build(
    name: str, *, in_channels: int = 3, image_size: tuple[int, ...] = (224, 224), num_classes: int = 1000
) -> nn.Module:
    """`mobilenetv1` with fresh weights; its pictures `(B, in_channels, H, W)` may be of any size.

    Raises:
        UserError: there is no such model.

    >>> sum(p.numel() for p in build("mobilenetv1").parameters())
    4231976
    """
    if name not in names():
        raise UserError(f"unknown model 'imagenet/{name}'{nearest(name, names())}")
    stages: list[nn.Module] = [nn.Sequential(*conv_norm(in_channels, 32, 3, 2), nn.ReLU())]
    inputs = 32
    for plan in _STAGES:
        layers: list[nn.Module] = []
        for width, stride in plan:
            layers += [*conv_norm(inputs, inputs, 3, stride, groups=inputs), nn.ReLU()]
            layers += [*conv_norm(inputs, width, 1), nn.ReLU()]
            inputs = width
        stages.append(nn.Sequential(*layers))
    return Classifier(stages, inputs, num_classes)


def names() -> list[str]:
    """All of them."""
    return ["mobilenetv1"]
