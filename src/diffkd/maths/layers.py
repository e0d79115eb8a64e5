"""Layers and reductions for `(B, C, *S)`: vectors, sequences, maps and volumes alike."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class _Norm:
    """BatchNorm that falls back to its running statistics where there is one value per channel."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:  # type: ignore[attr-defined]
            self.eval()  # type: ignore[attr-defined]
            out = super().forward(x)  # type: ignore[misc]
            self.train()  # type: ignore[attr-defined]
            return out  # type: ignore[no-any-return]
        return super().forward(x)  # type: ignore[misc,no-any-return]


class _Norm1d(_Norm, nn.BatchNorm1d): ...


class _Norm2d(_Norm, nn.BatchNorm2d): ...


class _Norm3d(_Norm, nn.BatchNorm3d): ...


def norm(dims: int, channels: int) -> nn.Module:
    """BatchNorm for features of so many spatial axes; one value per channel is not refused.

    >>> norm(0, 4)(torch.rand(1, 4)).shape
    torch.Size([1, 4])
    """
    return (_Norm1d, _Norm1d, _Norm2d, _Norm3d)[dims](channels)


def conv(dims: int, inputs: int, outputs: int, kernel: int = 1, *, bias: bool = True) -> nn.Module:
    """A convolution of that rank that keeps the size; for vectors a linear layer.

    >>> conv(1, 3, 5, kernel=3)(torch.rand(2, 3, 7)).shape
    torch.Size([2, 5, 7])
    """
    if dims == 0:
        return nn.Linear(inputs, outputs, bias)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return kind(inputs, outputs, kernel, padding=kernel // 2, bias=bias)


def resize(feature: Tensor, size: tuple[int, ...]) -> Tensor:
    """Averages `(B, C, *S)` down to a spatial size, for 1 to 3 spatial axes."""
    if tuple(feature.shape[2:]) == size:
        return feature
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
    return pool(feature, size)  # type: ignore[arg-type]


def without_void(feature: Tensor, valid: Tensor | None) -> Tensor:
    """The feature `(B, C, *S)` with zeros where `(B, *S)` is False; no gradient passes there.

    >>> without_void(torch.tensor([[[1.0, torch.nan]]]), torch.tensor([[True, False]]))
    tensor([[[1., 0.]]])
    """
    # Not a product, in which inf and nan would stay nan.
    return feature if valid is None else feature.masked_fill(~valid.unsqueeze(1), 0)


def pooled(feature: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over each sample's valid positions: `(B, C, *S)` to `(B, C)`; 0 where it has none.

    >>> pooled(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3])
    """
    if feature.dim() == 2:
        return feature
    if valid is None:
        return feature.flatten(2).mean(2)
    count = valid.flatten(1).sum(1, keepdim=True).clamp(min=1)
    return without_void(feature, valid).flatten(2).sum(2) / count


def unit(vectors: Tensor) -> Tensor:
    """Vectors `(..., D)` divided by their lengths; a zero vector stays one, and its gradient is finite.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    # Division by a tiny number instead would blow the gradient of a dead feature up to 1e12.
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(length > 0, length, 1)


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """Of all rows of two matrices: `(..., N, D)` and `(..., M, D)` to `(..., N, M)`, in their own precision.

    >>> inner_products(torch.eye(2), torch.ones(1, 2))
    tensor([[1.],
            [1.]])
    """
    # Autocast would take the product in half precision, whatever the precision of its inputs.
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT


def recomputed(layer: Callable[..., Tensor], within: nn.Module) -> Callable[..., Tensor]:
    """A layer that is run once more in the backward pass, so that nothing within it is kept till then.

    Args:
        layer: to be run.
        within: what holds its BatchNorms; their running statistics move once.
    """

    def run(*inputs: Any) -> Tensor:
        # a compiled graph repeats no change of a buffer, and takes no contexts
        how: dict[str, Any] = {}
        if not torch.compiler.is_compiling():
            how["context_fn"] = lambda: (nullcontext(), _fixed(within))
        found: Tensor = checkpoint(layer, *inputs, use_reentrant=False, **how)
        return found

    return run


@contextmanager
def _fixed(module: nn.Module) -> Iterator[None]:
    """Lets BatchNorms normalise by each batch without moving their running statistics."""
    norms = [(m, m.momentum, m.num_batches_tracked) for m in module.modules() if isinstance(m, _BatchNorm)]
    for found, _, _ in norms:
        found.momentum, found.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for found, momentum, count in norms:
            found.momentum, found.num_batches_tracked = momentum, count
