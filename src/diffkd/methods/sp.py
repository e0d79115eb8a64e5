"""SP: Similarity-Preserving Knowledge Distillation (Tung and Mori, ICCV 2019, arXiv 1907.09682)."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from diffkd.batch import Batch
from diffkd.maths.layers import inner_products, unit
from diffkd.maths.losses import precise
from diffkd.methods.base import Method, Setup, needed_features


class SimilarityPreserving(Method):
    """Samples of a batch that are alike for the teacher are to be alike for the student.

    Tung and Mori, ICCV 2019, arXiv 1907.09682. With Q the features `(B, C * positions)`, and G the
    matrix Q Q^T `(B, B)` with each row divided by its length, the loss is

        kd = ||G_student - G_teacher||_F^2 / B^2.

    Its weight for CIFAR-100 is 3000. The matrices are as large as the batch, whatever the features'
    size, so neither model's is resized. The loss compares samples within a batch: with a single one
    there is nothing to learn.

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

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.names = [pair.name for pair in needed_features(setup, "sp", resizes=False)]

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The difference of similarities, by pair."""
        return {
            f"{name}.kd": F.mse_loss(_similarities(student[name]), _similarities(teacher[name].detach()))
            for name in self.names
        }


def _similarities(feature: Tensor) -> Tensor:
    """`(B, C, *S)` to `(B, B)`, in rows of length 1."""
    rows = precise(feature).flatten(1)
    return unit(inner_products(rows, rows))
