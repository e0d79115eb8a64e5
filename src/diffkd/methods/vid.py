"""VID: Variational Information Distillation (Ahn et al., CVPR 2019, arXiv 1904.05835)."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.maps import matched
from diffkd.maths.layers import conv
from diffkd.maths.losses import masked_mean, precise
from diffkd.methods.base import Method, Pair, Range, Setup, module_key, needed_features

SMALLEST_VARIANCE = 1e-5


class VID(Method):
    """How unlikely the teacher's feature is under a Gaussian predicted from the student's.

    Ahn et al., CVPR 2019, arXiv 1904.05835: the bound that it trains is on the mutual information of the
    two. With mu three 1x1 convolutions without biases (linear layers for vectors), ReLU between them, and
    v = softplus(a) + 1e-5 a variance for each of the teacher's channels, the loss is

        kd = mean of ((teacher - mu(student))^2 / v + log v) / 2

    over samples, channels and positions. It may fall below 0. For CIFAR-100 the variance starts at 5,
    and the weight is 1.

    Use it where the student cannot follow all of the teacher's channels: it learns how much to ask
    of each.

    Args:
        setup: what the run taps.
        initial_variance: v at the start.

    Raises:
        UserError: no feature is tapped, the two of a pair are of different kinds, or the variance is
            impossible.

    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "vid", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['vid.0.kd']
    """

    stages, uses_logits = "all", False
    search = (Range("initial_variance", 0.5, 50.0),)

    def __init__(self, setup: Setup, *, initial_variance: float = 5.0) -> None:
        super().__init__()
        if not initial_variance > SMALLEST_VARIANCE:
            raise UserError(f"initial_variance={initial_variance}: needs more than {SMALLEST_VARIANCE}")
        self.pairs = needed_features(setup, "vid")
        self.gaussians = nn.ModuleDict(
            {module_key(pair.name): Gaussian(pair, initial_variance) for pair in self.pairs}
        )

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The negative log-likelihood, by pair."""
        losses: dict[str, Tensor] = {}
        for pair in self.pairs:
            features = matched(student[pair.name], teacher[pair.name].detach(), batch.valid)
            losses[f"{pair.name}.kd"] = self.gaussians[module_key(pair.name)](*features)
        return losses


class Gaussian(nn.Module):
    """The teacher's feature given the student's: a mean per entry, a variance per channel.

    Args:
        pair: whose features these are.
        initial_variance: at the start.
    """

    def __init__(self, pair: Pair, initial_variance: float) -> None:
        super().__init__()
        dims, inputs, outputs = pair.student.spatial_dims, pair.student.channels, pair.teacher.channels
        self.mean = nn.Sequential(
            conv(dims, inputs, outputs, bias=False),
            nn.ReLU(),
            conv(dims, outputs, outputs, bias=False),
            nn.ReLU(),
            conv(dims, outputs, outputs, bias=False),
        )
        excess = initial_variance - SMALLEST_VARIANCE
        # The softplus's inverse, in a form that does not overflow.
        raw = excess + math.log(-math.expm1(-excess))
        self.raw_variance = nn.Parameter(torch.full((outputs,), raw))

    def forward(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        """Mean negative log-likelihood, less its constant, over valid positions `(B, *S)`."""
        variance = F.softplus(precise(self.raw_variance)) + SMALLEST_VARIANCE
        variance = variance.view(-1, *[1] * (student.dim() - 2))
        error = precise(self.mean(student)) - precise(teacher)
        return 0.5 * masked_mean(error.square() / variance + variance.log(), valid)
