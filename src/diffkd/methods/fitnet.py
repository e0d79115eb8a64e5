"""FitNets: Hints for Thin Deep Nets (Romero et al., ICLR 2015, arXiv 1412.6550)."""

from collections.abc import Mapping

from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.features.maps import matched
from diffkd.maths.layers import conv
from diffkd.maths.losses import precise, squared_error
from diffkd.methods.base import Method, Setup, module_key, needed_features


class FitNet(Method):
    """Mean squared error of the teacher's feature and what a 1x1 convolution makes of the student's.

    Romero et al., ICLR 2015, arXiv 1412.6550. With r the convolution (a linear layer for vectors), and
    the mean over samples, channels and positions, the loss is

        kd = mean((r(student) - teacher)^2).

    The paper trains the hint in a stage of its own; here, as is usual since, it is one of the losses of
    the whole training. Its weight for CIFAR-100 is 100.

    Args:
        setup: what the run taps.

    Raises:
        UserError: no feature is tapped, or the two of a pair are of different kinds.

    >>> import torch
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "fitnet", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['fitnet.0.kd']
    """

    stages, uses_logits = "last", False
    weight = 100.0

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.pairs = needed_features(setup, "fitnet")
        self.regressors = nn.ModuleDict(
            {
                module_key(pair.name): conv(
                    pair.student.spatial_dims, pair.student.channels, pair.teacher.channels
                )
                for pair in self.pairs
            }
        )

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The distance, by pair."""
        losses: dict[str, Tensor] = {}
        for pair in self.pairs:
            ours, theirs, valid = matched(student[pair.name], teacher[pair.name].detach(), batch.valid)
            ours = self.regressors[module_key(pair.name)](ours)
            losses[f"{pair.name}.kd"] = squared_error(precise(ours), precise(theirs), valid)
        return losses
