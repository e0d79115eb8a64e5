"""transformers' detectors that ask with queries, made from their configuration classes: DETR and its kin.

They keep the contract of torchvision's detectors: losses in training, boxes, scores and labels from 1 else.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.errors import UserError, first_line, nearest

# Where each kind gives its levels, one layer each; whether its scores are sigmoids.
_KINDS = {
    "rt_detr_v2": ("model.decoder_input_proj", True),
    "d_fine": ("model.decoder_input_proj", True),
    "deformable_detr": ("model.input_proj", True),
    "detr": ("model.input_projection", False),
}
# RT-DETR's published sizes (arXiv 2407.17140): blocks, kind of block, widths, decoder layers, expansion.
_SIZES: dict[str, tuple[list[int], str, list[int], int, float]] = {
    "r18": ([2, 2, 2, 2], "basic", [64, 128, 256, 512], 3, 0.5),
    "r34": ([3, 4, 6, 3], "basic", [64, 128, 256, 512], 4, 0.5),
    "r50": ([3, 4, 6, 3], "bottleneck", [256, 512, 1024, 2048], 6, 1.0),
    "r101": ([3, 4, 23, 3], "bottleneck", [256, 512, 1024, 2048], 6, 1.0),
}


def names() -> list[str]:
    """Kinds, and RT-DETR v2 in its published sizes."""
    return [*_KINDS, *(f"rt_detr_v2-{size}" for size in _SIZES)]


def serves(name: str) -> bool:
    """Whether a name of transformers' is such a detector's."""
    return name.partition("-")[0] in _KINDS


def build(name: str, *, num_classes: int, **options: Any) -> nn.Module:
    """A detector with fresh weights, its own `state_dict` keys, and torchvision's contract.

    Args:
        name: a kind, or one with a size, such as `rt_detr_v2-r18`.
        num_classes: K.
        options: further arguments of the configuration class, `backbone_config` as a mapping with its
            `model_type`.

    Raises:
        UserError: there is no such size, an option is not taken, or transformers is not installed.
    """
    library = _library()
    kind, dash, size = name.partition("-")
    if dash and (kind != "rt_detr_v2" or size not in _SIZES):
        raise UserError(f"unknown model 'transformers/{name}'{nearest(name, names())}")
    known = library.AutoConfig.for_model(kind).to_dict()
    for option in options:
        if option not in known and option not in ("num_labels", "backbone_config"):
            raise UserError(f"model 'transformers/{name}' takes no option '{option}'{nearest(option, known)}")
    settings = {**_preset(library, kind, size), **options}
    if isinstance(settings.get("backbone_config"), Mapping):
        inner = dict(settings["backbone_config"])
        settings["backbone_config"] = library.AutoConfig.for_model(inner.pop("model_type", "resnet"), **inner)
    try:
        config = library.AutoConfig.for_model(kind, num_labels=num_classes, **settings)
        plain = type(library.AutoModelForObjectDetection.from_config(config))
        return _detector(plain, *_KINDS[kind])(config)  # type: ignore[no-any-return]
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, ImportError) as error:
        reason = first_line(error)
        raise UserError(f"model 'transformers/{name}' cannot be built: {reason}") from error


def _library() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "models 'transformers/...' need transformers: pip install 'diffkd[detection]'"
        ) from error
    return transformers


def _preset(library: ModuleType, kind: str, size: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if kind in ("rt_detr_v2", "d_fine"):
        # weights are fresh: statistics frozen at their start would normalise nothing
        settings["freeze_backbone_batch_norms"] = False
    if not size:
        return settings
    depths, block, widths, layers, expansion = _SIZES[size]
    backbone = library.RTDetrResNetConfig(
        depths=depths, layer_type=block, hidden_sizes=widths, out_features=["stage2", "stage3", "stage4"]
    )
    return settings | {
        "backbone_config": backbone,
        "encoder_in_channels": widths[1:],
        "decoder_layers": layers,
        "hidden_expansion": expansion,
    }


class _EnoughError(Exception):
    """The levels are there: what comes after them is not wanted."""

    def __init__(self, levels: dict[str, Tensor]) -> None:
        super().__init__()
        self.levels = levels


class _Levels(nn.Module):
    """The levels of a detector as one layer: it can be tapped, and runs the detector no further.

    Args:
        owner: the detector.
    """

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self._owner = (owner,)  # a tuple hides it: it is no part of this layer
        self._stop = False

    def forward(self, given: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """The levels by their number, of pictures `(B, 3, H, W)`, or as they are handed in."""
        if isinstance(given, list):
            return {str(i): level for i, level in enumerate(given)}
        self._stop = True
        try:
            self._owner[0].run(given)
        except _EnoughError as enough:
            return enough.levels
        finally:
            self._stop = False
        raise AssertionError("the detector ran without its levels")

    def hand_in(self, levels: list[Tensor]) -> None:
        """Takes the levels while the detector runs; stops it there if nothing more is wanted."""
        found = self(levels)
        if self._stop:
            raise _EnoughError(found)


def _detector(plain: Any, path: str, sigmoid: bool) -> Any:
    """A subclass of a model's class with torchvision's contract."""

    class QueryDetector(plain):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.backbone = _Levels(self)
            place = self.get_submodule(path)
            self._sources = list(place) if isinstance(place, nn.ModuleList) else [place]
            self._found: list[Tensor] = []
            for source in self._sources:
                source.register_forward_hook(self._keep)

        def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._found = [*(() if module is self._sources[0] else self._found), output]
            if module is self._sources[-1]:
                levels, self._found = self._found, []
                self.backbone.hand_in(levels)

        def run(self, images: Tensor, **more: Any) -> Any:
            """The model's own forward pass."""
            return super().forward(pixel_values=images, **more)

        def forward(self, images: Tensor, targets: Any = None) -> Any:
            """Losses of pictures `(B, 3, H, W)` in training, else boxes, scores, labels of each."""
            height, width = images.shape[-2:]
            if self.training and targets is not None:
                labels = [_as_labels(target, height, width) for target in targets]
                return {"set": self.run(images, labels=labels).loss}
            found = self.run(images)
            return _answers(found.logits, found.pred_boxes, (height, width), sigmoid)

    QueryDetector.__name__ = plain.__name__  # the library chooses the loss by it
    return QueryDetector


def _as_labels(target: Mapping[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
    """A target as these models want it: centres and sides in shares, classes from 0."""
    left, top, right, bottom = target["boxes"].unbind(1)
    boxes = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], 1)
    return {
        "class_labels": target["labels"] - 1,
        "boxes": boxes / boxes.new_tensor([width, height, width, height]),
    }


def _answers(logits: Tensor, boxes: Tensor, size: tuple[int, int], sigmoid: bool) -> list[dict[str, Tensor]]:
    """Every query's boxes: the best classes of all queries, or the best class of each."""
    x, y, w, h = boxes.unbind(-1)
    height, width = size
    corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    corners = corners * corners.new_tensor([width, height, width, height])
    if sigmoid:
        count, classes = logits.shape[1:]
        scores, places = logits.sigmoid().flatten(1).topk(count)
        labels = places % classes
        corners = corners.gather(1, (places // classes)[..., None].expand(-1, -1, 4))
    else:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    return [
        {"boxes": b, "scores": s, "labels": k + 1} for b, s, k in zip(corners, scores, labels, strict=True)
    ]
