"""RKD: Relational Knowledge Distillation (Park et al., CVPR 2019, arXiv 1904.05068)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkd.batch import Batch
from diffkd.features.maps import tuples_of, vectors
from diffkd.maths.layers import inner_products, unit
from diffkd.maths.losses import check_not_negative, masked_mean, precise
from diffkd.methods.base import Method, Setup, needed_features


class RKD(Method):
    """Distances between samples of a batch, and angles in their triangles, as the teacher has them.

    Park et al., CVPR 2019, arXiv 1904.05068. With f the features' means over the positions, mu the mean
    of the positive distances of a model, e_ij the vector f_i - f_j at length 1, and h the Huber loss
    (mean over all pairs or triples, a sample with itself included), the losses are

        distance = distance_weight h(|f_i - f_j| / mu of the student, and of the teacher)
        angle = angle_weight h(<e_ij, e_kj> of the student, and of the teacher).

    The weights for CIFAR-100 are the defaults, and 1 for the whole. The angles take memory of B^2 C and
    B^3 numbers. With a single sample both losses are 0.

    Use it where it matters how samples lie to each other (retrieval), or beside a method on class
    scores; the batch should not be very large.

    Args:
        setup: what the run taps.
        distance_weight: of the distances.
        angle_weight: of the angles.

    Raises:
        UserError: no feature is tapped, the two of a pair are of different kinds, or a weight is
            below 0.

    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "rkd", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['rkd.0.angle', 'rkd.0.distance']
    """

    stages, uses_logits = "last", False

    def __init__(self, setup: Setup, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        check_not_negative(distance_weight=distance_weight, angle_weight=angle_weight)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight
        self.names = [pair.name for pair in needed_features(setup, "rkd", resizes=False)]

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Both relations, by pair."""
        losses: dict[str, Tensor] = {}
        for name in self.names:
            ours, theirs, known = vectors(
                precise(student[name]), precise(teacher[name].detach()), batch.valid
            )
            distance = _huber(_distances(ours, known), _distances(theirs, known), tuples_of(known, 2))
            angle = _huber(_angles(ours), _angles(theirs), tuples_of(known, 3))
            losses[f"{name}.distance"] = self.distance_weight * distance
            losses[f"{name}.angle"] = self.angle_weight * angle
        return losses


def _huber(ours: Tensor, theirs: Tensor, known: Tensor | None) -> Tensor:
    """Mean over what is known."""
    if known is None:
        return F.smooth_l1_loss(ours, theirs)
    return masked_mean(F.smooth_l1_loss(ours, theirs, reduction="none"), known)


def _distances(vectors: Tensor, known: Tensor | None) -> Tensor:
    """Between all known rows `(B, C)`: `(B, B)`, those that are positive 1 in the mean."""
    # By way of a matrix product, which is faster, small distances would come out as noise.
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    if known is not None:
        distances = distances.masked_fill(~known.unsqueeze(1) | ~known, 0)
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1)


def _angles(vectors: Tensor) -> Tensor:
    """Cosines of the angles at each row, towards each two others: `(B, C)` to `(B, B, B)`."""
    towards = unit(vectors.unsqueeze(0) - vectors.unsqueeze(1))
    return inner_products(towards, towards)
