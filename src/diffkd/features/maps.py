"""Features with their validity: two of a pair at one size, and means over valid positions alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkd.batch import Batch
from diffkd.maths.losses import resize


def valid_at(batch: Batch, feature: Tensor) -> Tensor | None:
    """Where a feature `(B, C, *S)` stands for something valid: `(B, *S)` bool, None for everywhere.

    A position is valid where at least half of the pixels that it covers are.

    >>> valid = torch.tensor([[[True, True, False, False]] * 4])
    >>> valid_at(Batch(torch.rand(1, 3, 4, 4), valid=valid), torch.rand(1, 8, 2, 2))
    tensor([[[ True, False],
             [ True, False]]])
    """
    valid = batch.valid
    if valid is None or valid.dim() != feature.dim() - 1:
        return None
    if valid.shape[1:] == feature.shape[2:]:
        return valid
    return resize(valid[:, None].to(torch.float32), tuple(feature.shape[2:]))[:, 0] >= 0.5


def without_void(feature: Tensor, valid: Tensor | None) -> Tensor:
    """The feature `(B, C, *S)` with zeros where it is not valid; no gradient passes there."""
    return feature if valid is None else feature.masked_fill(~valid[:, None], 0)


def shrink(feature: Tensor, valid: Tensor | None, size: tuple[int, ...]) -> Tensor:
    """Averages `(B, C, *S)` down to a size, over valid positions alone; 0 where there is none."""
    if valid is None or tuple(feature.shape[2:]) == size:
        return resize(feature, size)
    share = resize(valid[:, None].to(feature.dtype), size)
    # where nothing is valid the sum is 0 too, and the divisor must not be
    return resize(without_void(feature, valid), size) / torch.where(share > 0, share, 1)


def matched(student: Tensor, teacher: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two features `(B, C, *S)` at the smaller size of the two along each axis, and where that is valid.

    What is not valid is zero in both, so that whatever stood there changes nothing and gets no gradient.

    Returns:
        Both features and `(B, *S)` bool, or None where all is valid.

    >>> batch = Batch(torch.rand(2, 3, 8, 8))
    >>> a, b, valid = matched(torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4), batch)
    >>> tuple(a.shape), tuple(b.shape), valid
    ((2, 3, 4, 4), (2, 5, 4, 4), None)
    """
    size = tuple(min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
    ours, theirs = (shrink(x, valid_at(batch, x), size) for x in (student, teacher))
    valid = valid_at(batch, ours)
    return without_void(ours, valid), without_void(theirs, valid), valid


def mean_where(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of `(B, *S)` or `(B, C, *S)` over valid positions (and channels); 0 where there is none.

    >>> valid = torch.tensor([[True, False]])
    >>> mean_where(torch.tensor([[[1.0, 50.0], [3.0, 50.0]]]), valid).item()
    2.0
    """
    if valid is None:
        return values.mean()
    where = valid if values.dim() == valid.dim() else valid[:, None].expand_as(values)
    return values.masked_fill(~where, 0).sum() / where.sum().clamp(min=1)


def squared_error(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    """Mean squared error of `(B, C, *S)` over valid positions and channels."""
    if valid is None:
        return F.mse_loss(student, teacher)
    return mean_where((student - teacher).square(), valid)


def pooled_where(feature: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over each sample's valid positions: `(B, C, *S)` to `(B, C)`.

    >>> pooled_where(torch.ones(2, 3, 4, 4), None).shape
    torch.Size([2, 3])
    """
    if feature.dim() == 2:
        return feature
    if valid is None:
        return feature.flatten(2).mean(2)
    count = valid.flatten(1).sum(1, keepdim=True).clamp(min=1)
    return without_void(feature, valid).flatten(2).sum(2) / count
