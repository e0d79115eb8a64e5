"""What several methods need: sizes made equal, divergences between class scores."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from diffkd.errors import UserError, kind_of


def resize(feature: Tensor, size: tuple[int, ...]) -> Tensor:
    """Averages `(B, C, *S)` down to a spatial size, for 1 to 3 spatial axes."""
    if tuple(feature.shape[2:]) == size:
        return feature
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
    return pool(feature, size)  # type: ignore[arg-type]


def to_common_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both features `(B, C, *S)` at the smaller size of the two along each axis.

    >>> import torch
    >>> a, b = to_common_size(torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4))
    >>> tuple(a.shape), tuple(b.shape)
    ((2, 3, 4, 4), (2, 5, 4, 4))
    """
    size = tuple(min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
    return resize(student, size), resize(teacher, size)


def precise(tensor: Tensor) -> Tensor:
    """In float32 at least: half precision is too coarse for losses."""
    return tensor if tensor.element_size() >= 4 else tensor.float()


def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Logits `(B, K, *S)` with mean 0 and standard deviation 1 over the classes.

    Logit Standardization in Knowledge Distillation (CVPR 2024, arXiv 2403.01427).

    >>> import torch
    >>> z = standardize(torch.randn(2, 10))
    >>> bool(z.mean(1).abs().max() < 1e-5)
    True
    """
    logits = precise(logits)
    return (logits - logits.mean(1, keepdim=True)) / (eps + logits.std(1, keepdim=True))


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of softened class scores `(B, K, *S)`: mean over samples and positions, times tau^2.

    Args:
        student: the student's logits.
        teacher: the teacher's logits.
        temperature: tau, which both are divided by.

    >>> import torch
    >>> z = torch.randn(4, 10)
    >>> kl_divergence(z, z, 4.0).item()
    0.0
    """
    ours, theirs = (F.log_softmax(precise(z) / temperature, dim=1) for z in (student, teacher))
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
    return divergence.mean() * temperature**2


def hard_targets(targets: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The class of each sample or position, and where there is one.

    Args:
        targets: a batch's: `(B,)` class indices, `(B, *S)` label maps of any size, class
            probabilities of as many axes as the logits, of which the largest counts; None takes the
            largest of the logits instead.
        logits: `(B, K, *S)`.

    Returns:
        Class indices `(B, *S)` between 0 and K - 1, and where they are to be trusted: labels outside
        of these (void pixels) are False there.

    Raises:
        UserError: the targets are not of these kinds.

    >>> import torch
    >>> hard_targets(torch.tensor([2, 255]), torch.zeros(2, 3))
    (tensor([2, 2]), tensor([ True, False]))
    """
    if targets is None:
        targets = logits
    if not isinstance(targets, Tensor):
        raise UserError(f"the batch's targets are {kind_of(targets)}; this method needs class labels")
    if targets.dim() == logits.dim() and targets.shape[1] == logits.shape[1]:
        targets = targets.argmax(1)
    if targets.dim() != logits.dim() - 1:
        raise UserError(
            f"targets {tuple(targets.shape)} do not go with class scores {tuple(logits.shape)}; "
            "this method needs one class label per score"
        )
    size = tuple(logits.shape[2:])
    if tuple(targets.shape[1:]) != size:
        targets = F.interpolate(targets[:, None].float(), size, mode="nearest-exact")[:, 0]
    labels, last = targets.long(), logits.shape[1] - 1
    return labels.clamp(0, last), (labels >= 0) & (labels <= last)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where the mask is True; 0 where it is True nowhere.

    >>> import torch
    >>> masked_mean(torch.tensor([1.0, 3.0, 50.0]), torch.tensor([True, True, False])).item()
    2.0
    """
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def check_positive(**options: float) -> None:
    """Refuses options that are 0 or less.

    Raises:
        UserError: one is.

    >>> check_positive(temperature=0)
    Traceback (most recent call last):
    diffkd.errors.UserError: temperature=0: needs more than 0
    """
    for name, value in options.items():
        if not value > 0:
            raise UserError(f"{name}={value}: needs more than 0")


def check_not_negative(**options: float) -> None:
    """Refuses options below 0.

    Raises:
        UserError: one is.

    >>> check_not_negative(beta=-1)
    Traceback (most recent call last):
    diffkd.errors.UserError: beta=-1: needs at least 0
    """
    for name, value in options.items():
        if not value >= 0:
            raise UserError(f"{name}={value}: needs at least 0")


def check_classes(tap: str, count: int) -> None:
    """Refuses a single class, of which softmax always gives 1.

    Raises:
        UserError: there are fewer than two.

    >>> check_classes("output", 1)
    Traceback (most recent call last):
    diffkd.errors.UserError: tap 'output' gives 1 class score; a softmax over it teaches nothing
    """
    if count < 2:
        raise UserError(f"tap '{tap}' gives {count} class score; a softmax over it teaches nothing")
