"""What several methods need: sizes made equal, divergences between class scores."""

import torch.nn.functional as F
from torch import Tensor


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
