"""transformers' models with fresh weights: `transformers/segformer-b0`, detectors as `transformers/detr`."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.errors import UserError, first_line, nearest
from diffkd.models import query_detectors
from diffkd.models.base import Wants

_SEGFORMER = {  # depths, widths, width of the decoder (arXiv 2105.15203)
    "b0": ([2, 2, 2, 2], [32, 64, 160, 256], 256),
    "b1": ([2, 2, 2, 2], [64, 128, 320, 512], 256),
    "b2": ([3, 4, 6, 3], [64, 128, 320, 512], 768),
    "b3": ([3, 4, 18, 3], [64, 128, 320, 512], 768),
    "b4": ([3, 8, 27, 3], [64, 128, 320, 512], 768),
    "b5": ([3, 6, 40, 3], [64, 128, 320, 512], 768),
}
_SHIFTED = {"tiny": ([2, 2, 6, 2], 96), "small": ([2, 2, 18, 2], 96), "base": ([2, 2, 18, 2], 128)}  # Swin
_UPERNET = {f"swin_{size}": size for size in _SHIFTED}
_QUERIES = "mask2former"


def build(
    name: str,
    *,
    in_channels: int = 3,
    image_size: tuple[int, ...] = (512, 512),
    num_classes: int = 19,
    **options: Any,
) -> nn.Module:
    """A model made from its configuration class, for segmentation or detection (`rt_detr_v2-r18`).

    Args:
        name: `segformer-b0` to `segformer-b5`, `upernet-swin_tiny`, `mask2former`, or another type of
            model that the library has for semantic segmentation (`dpt`, `mobilevit`).
        in_channels: of the pictures.
        image_size: told to models whose configuration has one.
        num_classes: K.
        options: further arguments of the configuration class.

    Raises:
        UserError: there is no such type (the nearest names are given), an option is not taken, or the
            library is not installed.

    >>> net = build("segformer-b0", num_classes=5)
    >>> net(torch.rand(1, 3, 32, 32)).logits.shape
    torch.Size([1, 5, 8, 8])
    """
    if query_detectors.serves(name):
        return query_detectors.build(name, num_classes=num_classes, **options)
    library = _library()
    kind, _, size = name.partition("-")
    _check(name)
    settings = {**_preset(library, kind, size, in_channels), "num_labels": num_classes, **options}
    try:
        config = library.AutoConfig.for_model(kind, **settings)
        unknown = [key for key in options if not hasattr(library.AutoConfig.for_model(kind), key)]
        if unknown:
            known = [key for key in vars(config) if key[0] != "_"]
            raise UserError(
                f"model 'transformers/{name}' takes no option '{unknown[0]}'{nearest(unknown[0], known)}"
            )
        if kind == _QUERIES:
            return _semantic(library)(config)
        return library.AutoModelForSemanticSegmentation.from_config(config)  # type: ignore[no-any-return]
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, ImportError) as error:
        reason = first_line(error)
        raise UserError(f"model 'transformers/{name}' cannot be built: {reason}") from error


def wants(name: str, weights: str | None) -> Wants:
    """Pictures as they come; three channels for detectors."""
    if query_detectors.serves(name):
        return Wants(channels=3)
    _check(name)
    return Wants()


def names() -> list[str]:
    """Those with a preset; other types of the library's go too."""
    sized: dict[str, dict[str, Any]] = {"segformer": _SEGFORMER, "upernet": _UPERNET}
    return [*(f"{kind}-{size}" for kind, sizes in sized.items() for size in sizes), _QUERIES]


def _library() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "models 'transformers/...' need transformers: pip install 'diffkd[segmentation]'"
        ) from error
    return transformers


def _check(name: str) -> None:
    """Raises UserError where there is no model of that name."""
    from transformers.models.auto import modeling_auto

    kind, dash, _ = name.partition("-")
    known = [*modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES, _QUERIES]
    if kind not in known or (dash and name not in names()):
        raise UserError(f"unknown model 'transformers/{name}'{nearest(name, [*names(), *known])}")


def _preset(library: ModuleType, kind: str, size: str, channels: int) -> dict[str, Any]:
    """What the configuration class is told of a size."""
    if kind == "segformer" and size:
        depths, widths, decoder = _SEGFORMER[size]
        return {
            "depths": depths,
            "hidden_sizes": widths,
            "decoder_hidden_size": decoder,
            "num_channels": channels,
        }
    if kind == "upernet" and size:
        depths, width = _SHIFTED[_UPERNET[size]]
        backbone = library.SwinConfig(
            depths=depths,
            embed_dim=width,
            num_heads=[width * 2**i // 32 for i in range(4)],
            num_channels=channels,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        return {"backbone_config": backbone, "auxiliary_in_channels": 4 * width}
    return {} if kind in (_QUERIES, "upernet") else {"num_channels": channels}


def _semantic(library: ModuleType) -> type[nn.Module]:
    """Mask2Former (arXiv 2112.01527) as a model of class scores per position."""

    class SemanticMask2Former(library.Mask2FormerForUniversalSegmentation):  # type: ignore[misc,name-defined]
        def forward(self, pixel_values: Tensor) -> Tensor:
            """Logs of the classes' shares `(B, K, H / 4, W / 4)`: every query's mask, by its classes."""
            found = super().forward(pixel_values)
            classes = found.class_queries_logits.softmax(-1)[..., :-1]  # the last one is no class
            masks = found.masks_queries_logits.sigmoid()
            return torch.einsum("bqk,bqhw->bkhw", classes, masks).clamp(min=1e-6).log()

    return SemanticMask2Former
