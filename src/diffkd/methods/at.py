"""AT: Paying More Attention to Attention (Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928)."""

from collections.abc import Mapping

from torch import Tensor

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.maps import matched
from diffkd.maths.layers import unit
from diffkd.maths.losses import masked_mean, precise
from diffkd.methods.base import Choice, Method, Setup, needed_features


class AttentionTransfer(Method):
    """Mean squared difference of attention maps: where in the picture the features are strong.

    Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928. The attention map a is the mean over the
    channels of |f|^p, as a vector of length 1 over the positions; the loss is

        kd = mean((a(student) - a(teacher))^2)

    over samples and positions. For CIFAR-100 p is 2 and the weight 1000. A map of a single position
    has the same attention whatever it holds: its loss is 0.

    Use it where both models have maps of several resolutions: it trains nothing of its own and
    costs next to nothing. Not for vectors.

    Args:
        setup: what the run taps.
        power: p, 1 or more.

    Raises:
        UserError: no feature is tapped, one is a vector, the two of a pair are of different kinds, or
            the power is impossible.

    >>> import torch
    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "at", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['at.0.kd']
    """

    stages, uses_logits = "all", False
    weight = 1000.0
    search = (Choice("power", (1.0, 2.0, 4.0)),)

    def __init__(self, setup: Setup, *, power: float = 2.0) -> None:
        super().__init__()
        # Below 1 the gradient at 0, which ReLU gives everywhere, is infinite.
        if not power >= 1:
            raise UserError(f"power={power}: needs at least 1")
        self.power = power
        self.names = [pair.name for pair in needed_features(setup, "at")]
        for pair in setup.features:
            if pair.student.spatial_dims == 0:
                raise UserError(
                    f"method 'at', tap '{pair.name}': a vector has no positions to attend to; "
                    "tap a feature map, or choose method 'fitnet'"
                )

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The difference of attention, by pair."""
        losses: dict[str, Tensor] = {}
        for name in self.names:
            sized = matched(precise(student[name]), precise(teacher[name].detach()), batch.valid)
            ours, theirs = map(self._attention, sized[:2])
            valid = None if sized[2] is None else sized[2].flatten(1)
            losses[f"{name}.kd"] = masked_mean((ours - theirs).square(), valid)
        return losses

    def _attention(self, feature: Tensor) -> Tensor:
        """`(B, C, *S)` to `(B, positions)`."""
        return unit(feature.abs().pow(self.power).mean(1).flatten(1))
