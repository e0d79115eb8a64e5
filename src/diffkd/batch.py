"""What travels through a training step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The target of a sample without a label among others that have one: of a pixel, of all of a row, or alone.
UNLABELLED = -1000


class Frame(NamedTuple):
    """Where a picture lies in the padded picture of a batch: at its top left.

    Attributes:
        size: `(H, W)` of the picture there.
        origin: `(H, W)` that it had before it was resized.
    """

    size: tuple[int, int]
    origin: tuple[int, int]


class Batch(NamedTuple):
    """One batch, whatever the task.

    Attributes:
        images: `(B, C, H, W)`, uint8 (0 to 255) or floating point (0 to 1); a list of `(C, H, W)`
            where pictures differ in size; a dict of the models' keyword inputs, as transformers' loaders
            give.
        targets: what the task's loss and metric compare with: `(B,)` class indices, `(B, K)` class
            probabilities, `(B, H, W)` label maps (void pixels included), a list of dicts of
            tensors (boxes, labels, masks); None when the images carry no labels, `UNLABELLED` for those
            that carry none among others.
        indices: `(B,)` int64 positions of the samples in their data set, for methods with a
            memory; None where unknown.
        valid: `(B, H, W)` bool, False where there is nothing to learn from (padding, void pixels), of
            any size: it covers the whole picture; None where all is valid.
        frames: where each picture lies in padded `images`; None where they are as they came.

    >>> import torch
    >>> Batch(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])).images.shape[0]
    2
    """

    images: Tensor | list[Tensor]
    targets: Any = None
    indices: Tensor | None = None
    valid: Tensor | None = None
    frames: tuple[Frame, ...] | None = None


def as_batch(value: Any) -> Batch:
    """A Batch of a Batch, images alone, a usual loader's `(images, targets)` or a dict of keyword inputs."""
    if isinstance(value, Batch):
        return value
    if isinstance(value, Tensor):
        return Batch(value)
    if isinstance(value, Mapping):
        return Batch(value, value.get("labels"))  # type: ignore[arg-type]
    if isinstance(value, list) and all(isinstance(v, Tensor) and v.dim() == 3 for v in value):
        return Batch(value)
    return Batch(*value)


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors of a nested batch on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(v, device) for key, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(v, device) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(to_device(v, device) for v in value)
    return value
