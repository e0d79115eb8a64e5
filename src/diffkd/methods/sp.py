"""SP: Similarity-Preserving Knowledge Distillation (Tung and Mori, ICCV 2019, arXiv 1907.09682)."""

from collections.abc import Mapping

from torch import Tensor

from diffkd.batch import Batch
from diffkd.features.maps import known_samples, tuples_of, valid_at
from diffkd.maths.layers import inner_products, unit, without_void
from diffkd.maths.losses import precise, squared_error
from diffkd.methods.base import Method, Setup, needed_features


class SimilarityPreserving(Method):
    """Samples of a batch that are alike for the teacher are to be alike for the student.

    Tung and Mori, ICCV 2019, arXiv 1907.09682. With Q the features `(B, C * positions)`, and G the
    matrix Q Q^T `(B, B)` with each row divided by its length, the loss is

        kd = ||G_student - G_teacher||_F^2 / B^2.

    Its weight for CIFAR-100 is 3000. The matrices are as large as the batch, whatever the features'
    size, so neither model's is resized. The loss compares samples within a batch: with a single one
    there is nothing to learn.

    Use it with large batches where the two features differ in width and size, and nothing is to be
    trained along.

    Args:
        setup: what the run taps.

    Raises:
        UserError: no feature is tapped, or the two of a pair are of different kinds.

    >>> import torch
    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "sp", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['sp.0.kd']
    """

    stages, uses_logits = "last", False
    weight = 3000.0

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.names = [pair.name for pair in needed_features(setup, "sp", resizes=False)]

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The difference of similarities, by pair."""
        losses: dict[str, Tensor] = {}
        for name in self.names:
            ours, theirs = student[name], teacher[name].detach()
            known = tuples_of(known_samples(ours, theirs, batch.valid), 2)
            ours, theirs = (_similarities(feature, batch.valid) for feature in (ours, theirs))
            losses[f"{name}.kd"] = squared_error(ours, theirs, known)
        return losses


def _similarities(feature: Tensor, valid: Tensor | None) -> Tensor:
    """`(B, C, *S)` to `(B, B)`, in rows of length 1."""
    rows = precise(without_void(feature, valid_at(valid, feature))).flatten(1)
    return unit(inner_products(rows, rows))
