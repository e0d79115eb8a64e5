"""Pairs of features with their validity: where they stand for something, both of a pair at one size."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkd.batch import UNLABELLED, Batch
from diffkd.errors import UserError
from diffkd.maths.layers import pooled, resize, without_void
from diffkd.maths.losses import hard_targets

_NO_CLASS = -1


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


def class_labels(batch: Batch, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The class of each sample or position of class scores `(B, K, *S)`, and where there is a valid one.

    Label maps of another size are brought to that of the scores by the nearest label. Where a batch's
    `valid` is larger than its label maps, these lie at its top left: the rest is padding.

    Returns:
        Classes `(B, *S)` from 0 to K - 1, and `(B, *S)` bool.

    Raises:
        UserError: the targets are no class labels.
    """
    return hard_targets(_framed(batch), scores, valid_at(batch.valid, scores))


def label_maps(batch: Batch, feature: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The class of each position of a feature `(B, C, *S)`, as in `class_labels`; none where unlabelled.

    Raises:
        UserError: the batch carries no label maps.
    """
    if batch.targets is None:
        raise UserError("this method needs label maps; the batch carries no targets")
    targets = batch.targets
    if isinstance(targets, Tensor):  # no class scores are at hand to stand for what is missing
        batch = batch._replace(targets=targets.masked_fill(targets == UNLABELLED, _NO_CLASS))
    return class_labels(batch, feature[:, :1].expand(-1, classes, *feature.shape[2:]))


def class_means(feature: Tensor, labels: Tensor, known: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The mean of each picture's positions of each class.

    Args:
        feature: `(B, C, *S)`, finite.
        labels: `(B, *S)`.
        known: positions that count, `(B, *S)`.
        classes: K.

    Returns:
        Means `(B, K, C)`, 0 where a class has no position, and `(B, K)` bool: where it has one.

    >>> known = torch.tensor([[True, True]])
    >>> class_means(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[1, 1]]), known, 2)
    (tensor([[[0.],
             [2.]]]), tensor([[False,  True]]))
    """
    member = F.one_hot(labels.flatten(1), classes).mT * known.flatten(1).unsqueeze(1)
    count = member.sum(2, keepdim=True)
    member = member.to(feature.dtype)
    means = torch.einsum("bkn,bcn->bkc", member, feature.flatten(2)) / count.clamp(min=1)
    return means, count.squeeze(2) > 0


def _framed(batch: Batch) -> Any:
    """The targets; label maps that `valid` is larger than, padded to its size by what is no class."""
    targets, valid = batch.targets, batch.valid
    maps = targets if isinstance(targets, list) else [targets]
    if valid is None or not all(isinstance(m, Tensor) and m.dim() >= valid.dim() - 1 for m in maps):
        return targets
    if isinstance(targets, Tensor) and targets.dim() != valid.dim():
        return targets
    if isinstance(targets, Tensor) and not any(_missing(targets, valid.shape[1:])):
        return targets
    padded = [F.pad(m, _missing(m, valid.shape[1:]), value=_NO_CLASS) for m in maps]
    return torch.stack(padded) if isinstance(targets, list) else padded[0]


def _missing(labels: Tensor, size: torch.Size) -> list[int]:
    """What `F.pad` is told to append to each axis, from the last one."""
    lengths = zip(reversed(size), reversed(labels.shape), strict=False)
    return [n for length, has in lengths for n in (0, max(0, length - has))]
