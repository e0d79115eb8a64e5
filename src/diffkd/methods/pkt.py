"""PKT: Probabilistic Knowledge Transfer (Passalis and Tefas, ECCV 2018, arXiv 1803.10837)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffkd.batch import Batch
from diffkd.features.maps import tuples_of, vectors
from diffkd.maths.layers import inner_products, unit
from diffkd.maths.losses import check_positive, masked_mean, precise
from diffkd.methods.base import Method, Setup, needed_features


class PKT(Method):
    """How probably each sample of a batch would pick each other as its neighbour, as for the teacher.

    Passalis and Tefas, ECCV 2018, arXiv 1803.10837. With f the features' means over the positions, and
    K_ij = (cos(f_i, f_j) + 1) / 2, the probabilities are P_ij = K_ij / sum_j K_ij, and the loss is

        kd = mean over all i and j of P_teacher log((P_teacher + eps) / (P_student + eps)).

    The paper sums where its code takes the mean; the weight for CIFAR-100, 30000, goes with the mean.
    With a single sample the loss is 0.

    Use it with large batches where the two features differ in width, and nothing is to be trained
    along.

    Args:
        setup: what the run taps.
        eps: keeps the logarithm finite.

    Raises:
        UserError: no feature is tapped, the two of a pair are of different kinds, or eps is not
            positive.

    >>> import torch
    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "pkt", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['pkt.0.kd']
    """

    stages, uses_logits = "last", False
    weight = 30000.0

    def __init__(self, setup: Setup, *, eps: float = 1e-7) -> None:
        super().__init__()
        check_positive(eps=eps)
        self.eps = eps
        self.names = [pair.name for pair in needed_features(setup, "pkt", resizes=False)]

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The divergence, by pair."""
        losses: dict[str, Tensor] = {}
        for name in self.names:
            pair = vectors(precise(student[name]), precise(teacher[name].detach()), batch.valid)
            known = tuples_of(pair[2], 2)
            ours, theirs = (_neighbours(unit(feature), known) for feature in pair[:2])
            divergence = theirs * ((theirs + self.eps) / (ours + self.eps)).log()
            losses[f"{name}.kd"] = masked_mean(divergence, known)
        return losses


def _neighbours(vectors: Tensor, known: Tensor | None) -> Tensor:
    """`(B, C)` of length 1 to probabilities `(B, B)`, each row's sum 1 over the pairs that are known."""
    # Rounding takes the cosine of opposites below -1, and the logarithm has no value there.
    kernel = ((inner_products(vectors, vectors) + 1) / 2).clamp(min=0)
    if known is None:
        return kernel / kernel.sum(1, keepdim=True)
    kernel = kernel.masked_fill(~known, 0)
    total = kernel.sum(1, keepdim=True)
    return kernel / torch.where(total > 0, total, 1)
