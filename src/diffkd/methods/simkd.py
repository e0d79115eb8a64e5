"""SimKD: Knowledge Distillation with the Reused Teacher Classifier (CVPR 2022, arXiv 2203.14001)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.features.maps import matched
from diffkd.maths.layers import conv, norm
from diffkd.maths.losses import check_positive, precise, squared_error
from diffkd.methods.base import Choice, Method, Setup, module_key, needed_features


class SimKD(Method):
    """Mean squared error of the student's last map, through a projector, and the teacher's.

    Chen et al., CVPR 2022, arXiv 2203.14001. With the mean over samples, channels and positions, the loss is

        kd = mean((projector(student) - teacher)^2).

    The published method keeps the projector and puts the
    teacher's classifier behind it, so that the labels have no part in the training (CIFAR-100: weight
    1, labels' loss 0). Here the student ships with its own classifier, which needs the labels' loss;
    the projector goes after the training. So this is a feature method, and its figures are not SimKD's.

    The projector ends in a ReLU: tap the teacher after its activation, not before.

    Use it where the student's last map is to come as near to the teacher's as it can.

    Args:
        setup: what the run taps.
        factor: by how much the projector's middle is narrower than the teacher's map.

    Raises:
        UserError: no feature is tapped, two differ in kind, or an option is impossible.

    >>> import torch
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"1": "1"}, "simkd", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['simkd.1.kd']
    """

    uses_logits = False
    search = (Choice("factor", (1, 2, 4)),)

    def __init__(self, setup: Setup, *, factor: int = 2) -> None:
        super().__init__()
        check_positive(factor=factor)
        self.keys = {pair.name: module_key(pair.name) for pair in needed_features(setup, "simkd")}
        self.projectors = nn.ModuleDict()
        for pair in setup.features:
            sizes = pair.student.channels, pair.teacher.channels
            self.projectors[self.keys[pair.name]] = _projector(pair.student.spatial_dims, *sizes, factor)

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The error, by pair."""
        losses: dict[str, Tensor] = {}
        for name, key in self.keys.items():
            ours, theirs, valid = matched(student[name], teacher[name].detach(), batch.valid)
            projector: Any = self.projectors[key]
            projected = projector(ours.to(projector[0].weight.dtype))
            losses[f"{name}.kd"] = squared_error(precise(projected), precise(theirs), valid)
        return losses


def _projector(dims: int, inputs: int, outputs: int, factor: int) -> nn.Sequential:
    """Three convolutions, narrow in the middle: `(B, inputs, *S)` to `(B, outputs, *S)`."""
    middle = max(1, outputs // factor)
    return nn.Sequential(
        conv(dims, inputs, middle),
        norm(dims, middle),
        nn.ReLU(),
        conv(dims, middle, middle, 3),
        norm(dims, middle),
        nn.ReLU(),
        conv(dims, middle, outputs),
        norm(dims, outputs),
        nn.ReLU(),
    )
