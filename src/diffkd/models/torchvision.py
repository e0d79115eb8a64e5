"""torchvision's models: `torchvision/resnet34`, with `weights: pretrained` or a name such as `IMAGENET1K_V1`.

Detectors go by the same names, and with a backbone of timm: `torchvision/retinanet:timm/resnet18`.
Segmentation models too (`torchvision/deeplabv3_resnet50`); those that can have their auxiliary head.
"""

from typing import Any

from torch import Tensor, nn
from torchvision import models
from torchvision.models import segmentation

from diffkd.errors import UserError, first_line, nearest
from diffkd.models import detectors
from diffkd.models.base import Wants
from diffkd.models.weights import load_backbone
from diffkd.pictures.files import IMAGENET_MEAN, IMAGENET_STD

# They give a tuple in training mode unless told otherwise.
_PLAIN = {"aux_logits": False, "init_weights": True}
_SEGMENTERS = models.list_models(module=segmentation)


def build(
    name: str,
    *,
    in_channels: int = 3,
    image_size: tuple[int, ...] = (224, 224),
    num_classes: int = 1000,
    **options: Any,
) -> nn.Module:
    """A model of torchvision with fresh weights; it takes pictures of 3 channels.

    Raises:
        UserError: there is no such model (the nearest names are given), or it does not take an option.

    >>> build("resnet18", num_classes=5).fc.out_features
    5
    """
    if detectors.serves(name):
        return detectors.build(name, num_classes=num_classes, image_size=image_size, **options)
    builder = _builder(name)
    plain = _PLAIN if name in ("googlenet", "inception_v3") else {}
    if name in _SEGMENTERS:
        return _segmenter(name, num_classes, **options)
    options = {**plain, **_sized(name, image_size), **options}
    try:
        return builder(weights=None, num_classes=num_classes, **options)  # type: ignore[no-any-return]
    except (TypeError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"model 'torchvision/{name}' cannot be built: {reason}") from error


def _segmenter(
    name: str, num_classes: int, *, backbone_weights: str | None = None, **options: Any
) -> nn.Module:
    """A segmentation model, with weights of a file in its backbone or fresh ones."""
    head: dict[str, Any] = {} if name.startswith("lraspp") else {"aux_loss": True}
    fixed: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": num_classes}
    try:
        model: nn.Module = models.get_model_builder(name)(**fixed, **(head | options))
    except (TypeError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"model 'torchvision/{name}' cannot be built: {reason}") from error
    if backbone_weights is not None:
        load_backbone(model.get_submodule("backbone"), backbone_weights, name)
    return model


def wants(name: str, weights: str | None) -> Wants:
    """Three channels; the fixed size of a transformer; of published weights also mean and deviation."""
    if detectors.serves(name):
        return Wants(None, IMAGENET_MEAN, IMAGENET_STD, 3) if weights else Wants(channels=3)
    _builder(name)
    if weights is None:
        return Wants(224 if _sized(name, (224, 224)) else None, channels=3)
    seen = _weights(name, weights).transforms()
    if name in _SEGMENTERS:
        return Wants(None, tuple(seen.mean), tuple(seen.std), 3)
    return Wants(seen.crop_size[0], tuple(seen.mean), tuple(seen.std), 3)


def state(name: str, weights: str) -> dict[str, Tensor]:
    """Published weights: "pretrained" for torchvision's choice, or a name such as "IMAGENET1K_V1".

    Raises:
        UserError: the model has no such weights, or they cannot be fetched.
    """
    if ":" in name:
        raise UserError(
            f"no weights file '{weights}', and 'torchvision/{name}' has no published weights; the backbone "
            "may: options.backbone_weights=pretrained"
        )
    chosen = _weights(name, weights)
    try:
        found = chosen.get_state_dict(progress=False, check_hash=True)
    except Exception as error:
        raise UserError(f"weights '{weights}' of 'torchvision/{name}' cannot be fetched: {error}") from error
    if name in _SEGMENTERS:
        return dict(found)
    return {key: value for key, value in found.items() if not key.lower().startswith("aux")}


def names() -> list[str]:
    """All of them."""
    return [*models.list_models(module=models), *_SEGMENTERS, *detectors.names()]


def _builder(name: str) -> Any:
    if name not in names():
        raise UserError(f"unknown model 'torchvision/{name}'{nearest(name, names())}")
    return models.get_model_builder(name)


def _weights(name: str, weights: str) -> Any:
    kinds = models.get_model_weights(name)
    known = {kind.name: kind for kind in kinds}
    if weights == "pretrained":
        return kinds.DEFAULT
    if weights not in known:
        raise UserError(
            f"no weights file '{weights}', nor weights of that name for 'torchvision/{name}'"
            f"{nearest(weights, ['pretrained', *known])}"
        )
    return known[weights]


def _sized(name: str, image_size: tuple[int, ...]) -> dict[str, Any]:
    """The argument by which models that take pictures of one size are told which."""
    if name.startswith("vit_"):
        return {"image_size": image_size[0]}
    return {"input_size": tuple(image_size)} if name.startswith("maxvit_") else {}
