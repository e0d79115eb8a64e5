"""segmentation-models-pytorch: `smp/unet:resnet34`, any architecture with any encoder, timm's `tu-` too."""

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import nn

from diffkd.errors import UserError, first_line, nearest
from diffkd.models.base import Wants
from diffkd.models.weights import load_backbone


def build(
    name: str,
    *,
    in_channels: int = 3,
    image_size: tuple[int, ...] = (512, 512),
    num_classes: int = 19,
    encoder_weights: str | None = None,
    **options: Any,
) -> nn.Module:
    """A segmentation model that gives logits `(B, K, H, W)`, with fresh weights but for the encoder's.

    Args:
        name: `ARCHITECTURE:ENCODER`, such as `deeplabv3plus:tu-mobilenetv3_small_050`.
        in_channels: of the pictures.
        image_size: told to encoders that take pictures of one size.
        num_classes: K.
        encoder_weights: a file of the encoder's (timm's own for `tu-` encoders), or "pretrained" to fetch
            published ones.
        options: further arguments of the architecture.

    Raises:
        UserError: there is no such architecture or encoder (the nearest names are given), an option is
            not taken, or the library is not installed.

    >>> build("fpn:resnet18", num_classes=5).segmentation_head[0].out_channels
    5
    """
    smp = _library()
    architecture, encoder = _parse(name)
    if not encoder.startswith("tu-"):  # timm's take more, and refuse what they do not know
        _check_options(name, smp.MODEL_ARCHITECTURES_MAPPING[architecture], options)
    if _fixed_size(encoder) and "dynamic_img_size" not in options:
        options = {"dynamic_img_size": True, **options}
    try:
        model: nn.Module = smp.create_model(
            architecture,
            encoder,
            encoder_weights=_published(encoder) if encoder_weights == "pretrained" else None,
            in_channels=in_channels,
            classes=num_classes,
            **options,
        )
    except Exception as error:  # the library raises nearly anything, and so does the way to its hub
        reason = first_line(error).strip("'\" ")
        raise UserError(f"model 'smp/{name}' cannot be built: {reason}") from error
    if encoder_weights not in (None, "pretrained"):
        load_backbone(model.get_submodule("encoder"), str(encoder_weights), encoder)
    return model


def _published(encoder: str) -> Any:
    """What the library calls ImageNet's weights of an encoder."""
    return True if encoder.startswith("tu-") else "imagenet"


def wants(name: str, weights: str | None) -> Wants:
    """Pictures as they come."""
    _parse(name)
    return Wants()


def names() -> list[str]:
    """Architectures, each with one usual encoder; any other encoder goes with them too."""
    try:
        return [f"{architecture}:resnet34" for architecture in _architectures()]
    except UserError:
        return []


def _library() -> ModuleType:
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise UserError(
            "models 'smp/...' need segmentation-models-pytorch: pip install 'diffkd[segmentation]'"
        ) from error
    return smp  # type: ignore[no-any-return]


def _architectures() -> list[str]:
    return sorted(_library().MODEL_ARCHITECTURES_MAPPING)


def _parse(name: str) -> tuple[str, str]:
    """Architecture and encoder, both of which exist."""
    architecture, _, encoder = name.partition(":")
    if architecture not in _architectures():
        raise UserError(f"unknown model 'smp/{name}'{nearest(architecture, _architectures())}")
    if not encoder:
        raise UserError(
            f"model 'smp/{name}' needs an encoder, such as 'smp/{name}:resnet34' or "
            f"'smp/{name}:tu-mobilenetv3_small_050'"
        )
    known = _library().encoders.get_encoder_names()
    if encoder.startswith("tu-"):
        import timm

        bare = encoder.removeprefix("tu-").partition(".")[0]
        if not timm.is_model(bare):
            near = nearest(bare, timm.list_models())
            raise UserError(f"model 'smp/{name}': timm has no encoder '{bare}'{near}")
    elif encoder not in known:
        raise UserError(f"model 'smp/{name}': unknown encoder '{encoder}'{nearest(encoder, known)}")
    return architecture, encoder


def _check_options(name: str, architecture: type[nn.Module], options: Mapping[str, Any]) -> None:
    """Refuses what the library would pass over."""
    known = [n for n in inspect.signature(architecture).parameters if n not in ("kwargs", "encoder_weights")]
    for option in options:
        if option not in known:
            raise UserError(f"model 'smp/{name}' takes no option '{option}'{nearest(option, known)}")


def _fixed_size(encoder: str) -> bool:
    """Whether a timm encoder takes pictures of one size unless told otherwise, as plain transformers do."""
    return encoder.startswith(("tu-vit_", "tu-deit"))
