"""Pairs of features with their validity: where they stand for something, both of a pair at one size."""

import torch
from torch import Tensor

from diffkd.maths.layers import pooled, resize, without_void


def valid_at(valid: Tensor | None, feature: Tensor) -> Tensor | None:
    """Where a feature `(B, C, *S)` stands for something valid: `(B, *S)` bool, None for everywhere.

    A position is valid where at least half of the pixels that it covers are.

    Args:
        valid: a batch's, of any size, as it covers the whole picture; None where all is valid.
        feature: of as many spatial axes; one of others is taken as valid everywhere.

    >>> valid = torch.tensor([[[True, True, False, False]] * 4])
    >>> valid_at(valid, torch.rand(1, 8, 2, 2))
    tensor([[[ True, False],
             [ True, False]]])
    """
    if valid is None or valid.dim() != feature.dim() - 1:
        return None
    if valid.shape[1:] == feature.shape[2:]:
        return valid
    return resize(valid[:, None].to(torch.float32), tuple(feature.shape[2:]))[:, 0] >= 0.5


def shrink(feature: Tensor, valid: Tensor | None, size: tuple[int, ...]) -> Tensor:
    """Averages `(B, C, *S)` down to a size, over valid positions `(B, *S)` alone; 0 where there is none."""
    if valid is None or tuple(feature.shape[2:]) == size:
        return resize(feature, size)
    share = resize(valid[:, None].to(feature.dtype), size)
    # where nothing is valid the sum is 0 too, and the divisor must not be
    return resize(without_void(feature, valid), size) / torch.where(share > 0, share, 1)


def matched(
    student: Tensor, teacher: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two features `(B, C, *S)` at the smaller size of the two along each axis, and where that is valid.

    What is not valid is zero in both, so that whatever stood there changes nothing and gets no gradient.

    Args:
        student: the student's feature.
        teacher: the teacher's, of as many spatial axes.
        valid: a batch's, of any size.

    Returns:
        Both features and `(B, *S)` bool, or None where all is valid.

    >>> a, b, valid = matched(torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4))
    >>> tuple(a.shape), tuple(b.shape), valid
    ((2, 3, 4, 4), (2, 5, 4, 4), None)
    """
    size = tuple(min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
    ours, theirs = (shrink(x, valid_at(valid, x), size) for x in (student, teacher))
    valid = valid_at(valid, ours)
    return without_void(ours, valid), without_void(theirs, valid), valid


def vectors(
    student: Tensor, teacher: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Means over each sample's valid positions: two features `(B, C, *S)`, of any sizes, to `(B, C)`.

    Args:
        student: the student's feature.
        teacher: the teacher's.
        valid: a batch's, of any size.

    Returns:
        Both, and `(B,)` bool: whether the sample has a valid position in each; None where all have.

    >>> a, b, known = vectors(torch.ones(2, 3, 4, 4), torch.ones(2, 5), torch.zeros(2, 4, 4).bool())
    >>> tuple(a.shape), tuple(b.shape), known
    ((2, 3), (2, 5), tensor([False, False]))
    """
    masks = [valid_at(valid, feature) for feature in (student, teacher)]
    return pooled(student, masks[0]), pooled(teacher, masks[1]), known_samples(student, teacher, valid)


def known_samples(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor | None:
    """Which samples `(B,)` have a valid position in each of two features; None where all have."""
    masks = [valid_at(valid, feature) for feature in (student, teacher)]
    known = [mask.flatten(1).any(1) for mask in masks if mask is not None]
    return torch.stack(known).all(0) if known else None


def tuples_of(known: Tensor | None, count: int) -> Tensor | None:
    """Which pairs (`count` 2) or triples (3) of samples are all known: `(B,)` to `(B, B)` or `(B, B, B)`.

    >>> tuples_of(torch.tensor([True, False]), 2)
    tensor([[ True, False],
            [False, False]])
    """
    if known is None:
        return None
    found = known
    for _ in range(count - 1):
        found = found.unsqueeze(-1) & known
    return found
