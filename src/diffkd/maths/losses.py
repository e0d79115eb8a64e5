"""What several methods need: masked means, divergences between class scores, checks of options."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkd.batch import UNLABELLED
from diffkd.errors import UserError, kind_of


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


def usual_temperature(per_position: bool) -> float:
    """Of class scores where nobody names one: 1 where every position has its own, as dense prediction is
    published, else 4, as classification is.

    >>> usual_temperature(per_position=False), usual_temperature(per_position=True)
    (4.0, 1.0)
    """
    return 1.0 if per_position else 4.0


def kl_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    """KL divergence of softened class scores `(B, K, *S)`: mean over samples and positions, times tau^2.

    Args:
        student: the student's logits.
        teacher: the teacher's logits.
        temperature: tau, which both are divided by.
        valid: positions that count, `(B, *S)`; None for all.

    >>> import torch
    >>> z = torch.randn(4, 10)
    >>> kl_divergence(z, z, 4.0).item()
    0.0
    """
    ours, theirs = (F.log_softmax(precise(z) / temperature, dim=1) for z in (student, teacher))
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
    return masked_mean(divergence, valid) * temperature**2


def binary_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    """KL divergence of softened yes and no of every class `(B, K, *S)`: mean over all, times tau^2.

    For classes that do not exclude one another: each score goes through a sigmoid of its own, as in
    Multi-Label Knowledge Distillation (ICCV 2023, arXiv 2308.06453).

    Args:
        student: the student's logits.
        teacher: the teacher's logits.
        temperature: tau, which both are divided by.
        valid: positions that count, `(B, *S)`; None for all.

    >>> import torch
    >>> z = torch.randn(4, 10)
    >>> binary_divergence(z, z, 4.0).item()
    0.0
    """
    ours, theirs = (precise(z) / temperature for z in (student, teacher))
    yes = theirs.sigmoid() * (F.logsigmoid(theirs) - F.logsigmoid(ours))
    no = (-theirs).sigmoid() * (F.logsigmoid(-theirs) - F.logsigmoid(-ours))
    return masked_mean(yes + no, valid) * temperature**2


def hard_targets(targets: Any, logits: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The class of each sample or position, and where there is one.

    Args:
        targets: a batch's: `(B,)` class indices, `(B, *S)` label maps of any size, class
            probabilities of as many axes as the logits, of which the largest counts; None takes the
            largest of the logits instead, as it does of a sample that is `UNLABELLED` among others.
        logits: `(B, K, *S)`.
        valid: positions that count, `(B, *S)`; None for all.

    Returns:
        Class indices `(B, *S)` between 0 and K - 1, and where they are to be trusted: labels outside
        of these (void pixels) are False there, and what is not valid.

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
        targets = targets.argmax(1).masked_fill(targets[:, 0] == UNLABELLED, UNLABELLED)
    if targets.dim() != logits.dim() - 1:
        raise UserError(
            f"targets {tuple(targets.shape)} do not go with class scores {tuple(logits.shape)}; "
            "this method needs one class label per score"
        )
    size = tuple(logits.shape[2:])
    if tuple(targets.shape[1:]) != size:
        targets = F.interpolate(targets[:, None].float(), size, mode="nearest-exact")[:, 0]
    labels, last = targets.long(), logits.shape[1] - 1
    labels = torch.where(labels == UNLABELLED, logits.argmax(1), labels)
    known = (labels >= 0) & (labels <= last)
    return labels.clamp(0, last), known if valid is None else known & valid


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `(B, *S)` or `(B, C, *S)` where the mask is True; 0 where it is True nowhere.

    Args:
        values: what stands where the mask is False, inf and nan too, changes nothing.
        mask: of the values' shape, or `(B, *S)` for all channels; None for everywhere.

    >>> import torch
    >>> masked_mean(torch.tensor([1.0, 3.0, 50.0]), torch.tensor([True, True, False])).item()
    2.0
    """
    if mask is None:
        return values.mean()
    if mask.dim() < values.dim():
        mask = mask.unsqueeze(1).expand_as(values)
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def squared_error(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared error of `(B, C, *S)` over channels and valid positions `(B, *S)`.

    >>> import torch
    >>> squared_error(torch.zeros(2, 3), torch.full((2, 3), 2.0)).item()
    4.0
    """
    if valid is None:
        return F.mse_loss(student, teacher)
    return masked_mean((student - teacher).square(), valid)


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
