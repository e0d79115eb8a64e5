"""From a model's name to a module, and the pictures as that module wants them."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.errors import UserError
from diffkd.names import is_path, load_object, load_submodule, submodules


def build(name: str, *, num_classes: int | None, image_shape: tuple[int, int, int]) -> nn.Module:
    """A model with fresh weights.

    Args:
        name: `source/model` where a file of this package is the source, or `my_module:function`
            (called with those of `num_classes`, `in_channels` and `image_size` that it takes).
        num_classes: size of the model's head; None where the task has no classes.
        image_shape: `(C, H, W)` of the pictures it will see.

    Raises:
        UserError: no such source or model; the nearest names are given.
    """
    known: dict[str, Any] = {"in_channels": image_shape[0], "image_size": image_shape[1:]}
    if num_classes is not None:
        known["num_classes"] = num_classes
    if is_path(name):
        return _build_outside(name, known)
    source, slash, model = name.partition("/")
    if not slash:
        raise UserError(
            f"model '{name}' has no source; write one of "
            + ", ".join(f"'{s}/{name}'" for s in submodules("diffkd.models"))
            + " or 'my_module:function'"
        )
    module = load_submodule("diffkd.models", source, "model source")
    return module.build(model, **known)  # type: ignore[no-any-return]


def _build_outside(name: str, known: dict[str, Any]) -> nn.Module:
    function = load_object(name)
    if not callable(function):
        raise UserError(f"model '{name}' is not a function or class")
    takes = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    model = function(**{k: v for k, v in known.items() if open_ended or k in takes})
    if not isinstance(model, nn.Module):
        raise UserError(f"model '{name}' returned {type(model).__name__}, not a torch.nn.Module")
    return model


class Preprocess(nn.Module):
    """Pictures of a batch as one model wants them: floating point, its size, its normalisation.

    Holds no state of its own in `state_dict`.

    Args:
        mean, std: per channel, on the scale 0 to 1.
        size: `(H, W)` to resize to (bilinear, antialiased); None keeps the size.

    >>> Preprocess((0.5,), (0.5,))(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)).max()
    tensor(1.)
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """`(B, C, H, W)`, or a list of `(C, H, W)`, uint8 or float in 0 to 1, to normalised float."""
        if isinstance(images, list):
            return [self._one(image[None])[0] for image in images]
        return self._one(images)

    def _one(self, images: Tensor) -> Tensor:
        if not images.is_floating_point():
            images = images.to(self.mean.dtype) / 255
        if self.size is not None and images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return (images - self.mean) / self.std
