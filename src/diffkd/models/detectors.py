"""torchvision's detectors, as they are or with a pyramid on a backbone of timm.

Every detector here, and every one of one's own, keeps torchvision's contract: in training
`model(images, targets)` gives a dict of losses; else `model(images)` gives a list of dicts with `boxes`
`(n, 4)` (left, top, right, bottom in pixels), `scores` `(n,)` and `labels` `(n,)`; labels start at 1, for 0
is the ground; `model.backbone(images)` gives the pyramid. Mask R-CNN finds boxes
here, without its branch for outlines.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import timm
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from diffkd.errors import UserError, first_line, nearest
from diffkd.models.weights import load_backbone

STRIDES = (4, 8, 16, 32)  # of a backbone's maps that pyramids are built on: P2 to P5


def names() -> list[str]:
    """Torchvision's own, and the heads that any backbone takes (`retinanet:timm/resnet18`)."""
    own = models.list_models(module=detection)
    # people's joints are in no data set here
    return [*(n for n in own if not n.startswith("keypoint")), *(f"{h}:timm/resnet18" for h in _HEADS)]


def serves(name: str) -> bool:
    """Whether a name of torchvision's is a detector's."""
    return ":" in name or name in names()


def build(name: str, *, num_classes: int, image_size: tuple[int, ...], **options: Any) -> nn.Module:
    """A detector with fresh weights.

    Args:
        name: `retinanet_resnet50_fpn_v2`, or a head and a backbone: `fcos:timm/resnet18`.
        num_classes: K; the detector tells K + 1 apart, for label 0 is the ground.
        image_size: `(H, W)` of typical pictures: the shipped model brings others to that size.
        options: of torchvision's detector (`score_thresh`); and of one on a backbone, see `on_backbone`.

    Raises:
        UserError: there is no such head or backbone, or an option is not taken.

    >>> import torch
    >>> net = build("fcos:timm/test_resnet", num_classes=3, image_size=(64, 64), channels=32)
    >>> list(net.backbone(torch.rand(1, 3, 64, 64)))
    ['p3', 'p4', 'p5', 'p6', 'p7']
    """
    sizes = {"min_size": min(image_size), "max_size": max(image_size)}
    try:
        if ":" in name:
            return on_backbone(name, num_classes + 1, **{**sizes, **options})
        fixed = {} if name.startswith("ssd") else sizes
        model: nn.Module = models.get_model(
            name, weights=None, weights_backbone=None, num_classes=num_classes + 1, **{**fixed, **options}
        )
    except (TypeError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"model 'torchvision/{name}' cannot be built: {reason}") from error
    if name.startswith("maskrcnn"):
        for part in ("mask_roi_pool", "mask_head", "mask_predictor"):
            setattr(model.roi_heads, part, None)
    return model


def on_backbone(
    name: str,
    num_classes: int,
    *,
    channels: int = 256,
    levels: tuple[int, int] | list[int] | None = None,
    anchor_size: float = 4.0,
    backbone_weights: str | None = None,
    **options: Any,
) -> nn.Module:
    """A head of torchvision on a pyramid over a backbone of timm.

    Args:
        name: head and backbone, such as `retinanet:timm/resnet18`.
        num_classes: with the ground.
        channels: width of the pyramid and of the head; a multiple of 32.
        levels: the pyramid's first and last level; level l has stride 2 to the l. P3 to P7, or P2 to P6
            for Faster R-CNN, if not given.
        anchor_size: side of the smallest anchor, in strides of its level.
        backbone_weights: a file of timm's weights, or "pretrained" to fetch published ones.
        options: further arguments of torchvision's class.
    """
    head, _, backbone = name.partition(":")
    if head not in _HEADS:
        raise UserError(f"unknown detector 'torchvision/{head}:...'{nearest(head, _HEADS)}")
    first, last = levels or ((2, 6) if head == "fasterrcnn" else (3, 7))
    if not 2 <= first <= 5 or last < first:
        raise UserError(f"model 'torchvision/{name}': levels={levels} must start at 2 to 5, such as [3, 7]")
    pyramid = Pyramid(backbone, channels, (first, last), backbone_weights)
    sides = [anchor_size * 2**level for level in range(first, last + 1)]
    return _HEADS[head](pyramid, num_classes, sides, options)


class Pyramid(nn.Module):
    """A feature pyramid (arXiv 1612.03144) over a backbone of timm.

    Args:
        name: `timm/resnet18`.
        channels: of every level.
        levels: the first and the last; those above stride 32 are made by convolutions.
        weights: a file of the backbone's weights, "pretrained", or None.

    Raises:
        UserError: no such backbone, or it gives no maps of strides that double.
    """

    def __init__(self, name: str, channels: int, levels: tuple[int, int], weights: str | None = None) -> None:
        super().__init__()
        self.body, widths, strides = _body(name, levels[0], weights)
        extra = levels[1] - 5
        self.names = [f"p{level}" for level in range(levels[0], levels[0] + len(strides))]
        blocks = {1: _Coarser(channels, 1), 2: LastLevelP6P7(channels, channels)}.get(extra)
        if extra > 2:
            blocks = _Coarser(channels, extra)
        self.keep = levels[1] - levels[0] + 1
        self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=blocks)
        self.widths, self.out_channels = widths, channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The levels `(B, channels, H / stride, W / stride)` of pictures `(B, 3, H, W)`, finest first."""
        maps = [_channels_first(x, c) for x, c in zip(self.body(images), self.widths, strict=True)]
        levels = self.fpn(OrderedDict(zip(self.names, maps, strict=True)))
        return OrderedDict(list(levels.items())[: self.keep])


def _channels_first(x: Tensor, channels: int) -> Tensor:
    return x if x.shape[1] == channels else x.movedim(-1, 1)


def _body(name: str, first: int, weights: str | None) -> tuple[nn.Module, list[int], list[int]]:
    """The backbone, giving maps from level `first` to stride 32, their widths and strides."""
    source, _, model = name.partition("/")
    if source != "timm":
        raise UserError(f"backbone '{name}': give one of timm's, such as 'timm/resnet18'")
    if not timm.is_model(model):
        raise UserError(f"unknown backbone '{name}'{nearest(model.partition('.')[0], timm.list_models())}")
    try:
        told: Any = timm.create_model(model, features_only=True).feature_info
        widths, strides = told.channels(), told.reduction()
        wanted = [i for i, stride in enumerate(strides) if stride in STRIDES and stride >= 2**first]
        if [strides[i] for i in wanted] != [s for s in STRIDES if s >= 2**first]:
            raise ValueError(f"its maps have strides {strides}, and a pyramid needs {STRIDES[first - 2 :]}")
        body = timm.create_model(
            model, features_only=True, out_indices=wanted, pretrained=weights == "pretrained"
        )
    except Exception as error:  # timm raises nearly anything, and so does the way to its hub
        reason = first_line(error)
        raise UserError(f"backbone '{name}' cannot serve a pyramid: {reason}") from error
    if weights not in (None, "pretrained"):
        load_backbone(body, str(weights), name)
    return body, [widths[i] for i in wanted], [strides[i] for i in wanted]


class _Coarser(detection.backbone_utils.ExtraFPNBlock):  # type: ignore[misc]
    """Further levels, each of the last by a convolution of stride 2."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(count))

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """The levels with the further ones, and their names."""
        for step in self.steps:
            results.append(step(results[-1].relu() if len(results) > len(x) else results[-1]))
            names.append(f"p{int(names[-1][1:]) + 1}")
        return results, names


def _anchors(sides: list[float], scales: int) -> AnchorGenerator:
    """Anchors of three shapes and so many sizes an octave, one side a level."""
    sizes = tuple(tuple(int(side * 2 ** (i / scales)) for i in range(scales)) for side in sides)
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sides))


def _retinanet(pyramid: Pyramid, classes: int, sides: list[float], options: Mapping[str, Any]) -> nn.Module:
    from torchvision.models.detection.retinanet import RetinaNet

    return RetinaNet(  # type: ignore[no-any-return]
        pyramid, classes, anchor_generator=_anchors(sides, 3), **options
    )


def _fcos(pyramid: Pyramid, classes: int, sides: list[float], options: Mapping[str, Any]) -> nn.Module:
    from torchvision.models.detection.fcos import FCOS, FCOSHead

    # one anchor a place, as large as its stride: what FCOS measures distances in
    anchors = AnchorGenerator(tuple((int(side / 4),) for side in sides), ((1.0,),) * len(sides))
    convs = {"num_convs": options["num_convs"]} if "num_convs" in options else {}
    head = FCOSHead(pyramid.out_channels, 1, classes, **convs)
    _group_by_eights(head, pyramid.out_channels)
    rest = {key: value for key, value in options.items() if key != "num_convs"}
    return FCOS(  # type: ignore[no-any-return]
        pyramid, classes, anchor_generator=anchors, head=head, **rest
    )


def _group_by_eights(head: nn.Module, channels: int) -> None:
    """Norms of 8 channels a group, as in heads of 256, where torchvision has 32 groups for any width.

    In a head of 32 channels these would be single channels, and zero where a map is one position.
    """
    for part in head.modules():
        for name, norm in part.named_children():
            if isinstance(norm, nn.GroupNorm):
                setattr(part, name, nn.GroupNorm(channels // 8, channels))


def _fasterrcnn(pyramid: Pyramid, classes: int, sides: list[float], options: Mapping[str, Any]) -> nn.Module:
    # the coarsest level proposes regions, and they are pooled from the others
    pooled = pyramid.names
    pool = MultiScaleRoIAlign(featmap_names=pooled, output_size=7, sampling_ratio=2)
    anchors = _anchors([2 * side for side in sides], 1)
    return detection.FasterRCNN(  # type: ignore[no-any-return]
        pyramid, classes, rpn_anchor_generator=anchors, box_roi_pool=pool, **options
    )


_HEADS: dict[str, Callable[..., nn.Module]] = {
    "retinanet": _retinanet,
    "fcos": _fcos,
    "fasterrcnn": _fasterrcnn,
}
