"""DIST: Knowledge Distillation from A Stronger Teacher (Huang et al., NeurIPS 2022, arXiv 2205.10536)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffkd.batch import Batch
from diffkd.features.maps import matched
from diffkd.maths.losses import check_not_negative, masked_mean, precise
from diffkd.methods.base import Method, Range, Setup, needed_logits, temperature_for, warn_of_two_classes


class DIST(Method):
    """Correlation of softened class scores with the teacher's, along the classes and along the batch.

    Huang et al., NeurIPS 2022, arXiv 2205.10536. With P the softmax at temperature tau, `(B, K)`, and
    r Pearson's correlation, the losses are

        inter = beta tau^2 (1 - mean over samples of r(P_student[b, :], P_teacher[b, :]))
        intra = gamma tau^2 (1 - mean over classes of r(P_student[:, k], P_teacher[:, k])).

    For CIFAR-100 beta and gamma are 2, the temperature 4, and the weight beside the labels' loss 1; for
    ImageNet the temperature is 1. Each position of a dense prediction is a sample of its own. With
    a single sample there is no intra-class relation, and its loss is a constant.

    Use it where the teacher is much stronger than the student: it asks for the scores up to scale
    and shift, not for their values. It goes well beside a method on features.

    Args:
        setup: what the run taps.
        beta: weight of the inter-class relation.
        gamma: weight of the intra-class relation.
        temperature: tau, which the scores are divided by; None is 4 for one set of scores a sample, and 1
            for scores per position.

    Raises:
        UserError: no class scores are tapped, or an option is impossible.

    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"": ""}, "dist", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['dist.output.inter', 'dist.output.intra']
    """

    stages = "none"
    search = (Range("temperature", 1.0, 10.0),)

    def __init__(
        self, setup: Setup, *, beta: float = 2.0, gamma: float = 2.0, temperature: float | None = None
    ) -> None:
        super().__init__()
        check_not_negative(beta=beta, gamma=gamma)
        self.beta, self.gamma = beta, gamma
        pairs = needed_logits(setup, "dist")
        warn_of_two_classes(pairs, "inter")
        self.temperatures = {pair.name: temperature_for(pair, temperature) for pair in pairs}

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Both relations, by pair."""
        losses: dict[str, Tensor] = {}
        for name, temperature in self.temperatures.items():
            scale = temperature**2
            *sized, valid = matched(precise(student[name]), precise(teacher[name]), batch.valid)
            ours, theirs = (_one_per_row(logits / temperature).softmax(1) for logits in sized)
            rows = None if valid is None else valid.flatten()
            inter = 1 - masked_mean(correlation(ours, theirs, 1), rows)
            intra = 1 - correlation(ours, theirs, 0, rows).mean()
            # Of no valid position the correlation is 0, but there is nothing to learn.
            some = 1.0 if rows is None else rows.any()
            losses[f"{name}.inter"] = self.beta * scale * inter * some
            losses[f"{name}.intra"] = self.gamma * scale * intra * some
        return losses


def correlation(a: Tensor, b: Tensor, dim: int, rows: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """Pearson's correlation of `(N, K)` along an axis; 0 where a tensor does not vary.

    Args:
        a: one tensor.
        b: the other.
        dim: the axis.
        rows: which rows count along axis 0, `(N,)` bool; None for all.
        eps: keeps the quotient finite.

    >>> a = torch.tensor([[1.0, 2.0, 3.0]])
    >>> round(correlation(a, 1 - 2 * a, 1).item(), 4)
    -1.0
    """
    if rows is None:
        a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    else:
        where, count = rows.unsqueeze(1), rows.sum().clamp(min=1)
        a, b = (x - (x * where).sum(dim, keepdim=True) / count for x in (a, b))
        a, b = a * where, b * where
    length_a, length_b = (torch.linalg.vector_norm(x, dim=dim) for x in (a, b))
    found: Tensor = (a * b).sum(dim) / (length_a * length_b + eps)
    return found


def _one_per_row(logits: Tensor) -> Tensor:
    """`(B, K, *S)` as `(B * S, K)`."""
    return logits.movedim(1, -1).flatten(0, -2)
