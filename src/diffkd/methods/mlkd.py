"""MLKD: Multi-level Logit Distillation (Jin, Wang and Lin, CVPR 2023)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.maths.layers import inner_products
from diffkd.maths.losses import check_positive, kl_divergence, precise, standardize
from diffkd.methods.base import Method, Setup, needed_logits


class MLKD(Method):
    """Class scores matched one by one, by likeness of samples and by likeness of classes.

    Jin, Wang and Lin, CVPR 2023 (not on arXiv). With P the softmax `(B, K)` at a temperature tau, the
    losses are sums over the temperatures of

        instance = tau^2 KL(P_teacher || P_student), mean over samples
        batch = |P_teacher P_teacher^T - P_student P_student^T|^2 / B
        class = |P_teacher^T P_teacher - P_student^T P_student|^2 / K.

    The published code masks the samples of a confidence (largest probability of the teacher) above the
    batch's median, and the classes of a probability mass above the classes' median. Its mask
    meets losses that are averaged already, so all it does is to scale them by the share that is left,
    which is a half, or more where values are equal; so it is here.

    For CIFAR-100 the temperatures are 2 to 6, and the weight 0.9 with 0.1 for the labels' loss;
    standardized, 9 and 0.1, with 2 in place of 4 among the temperatures. For ImageNet (ResNet-34 to
    ResNet-18) 1 is in place of 4, and the weights are 0.5 and 0.5.

    The published runs also show each picture in a weakly and a strongly augmented version. The labels'
    loss and `instance` are taken of both (at the temperatures 2 and 6 of the weak one twice, without
    its mask), `batch` and `class` of the weak one alone. Here there is one view, the weak one's losses.

    Use it for classification with large batches, for it compares their samples and classes with
    each other. Not for class scores of every position.

    Args:
        setup: what the run taps.
        temperatures: tau, one after the other; None is 2, 3, 4, 5, 6, or 2 in place of 4 for standardized
            scores.
        standardize: in `instance`, brings each sample's scores to mean 0 and standard deviation 1 first
            (Sun et al., CVPR 2024, arXiv 2403.01427); the weight is 9 where none is given.

    Raises:
        UserError: no class scores are tapped, they have spatial axes, or an option is impossible.

    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"": ""}, "mlkd", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['mlkd.output.batch', 'mlkd.output.class', 'mlkd.output.instance']
    """

    stages = "none"
    weight = 0.9
    standardized_weight = 9.0

    def __init__(
        self,
        setup: Setup,
        *,
        temperatures: Sequence[float] | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        if temperatures is None:
            temperatures = (2.0, 3.0, 2.0 if standardize else 4.0, 5.0, 6.0)
        if not temperatures:
            raise UserError("temperatures=[]: needs at least one")
        for temperature in temperatures:
            check_positive(temperatures=temperature)
        self.temperatures, self.standardize = tuple(temperatures), standardize
        pairs = needed_logits(setup, "mlkd", standardized=standardize)
        self.names = [pair.name for pair in pairs]
        for pair in pairs:
            if pair.student.spatial_dims or pair.teacher.spatial_dims:
                raise UserError(
                    f"method 'mlkd', tap '{pair.name}': compares every sample with every other, which "
                    "is too much for class scores per position; use 'kd', 'dkd' or 'dist'"
                )

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The three alignments, by pair."""
        losses: dict[str, Tensor] = {}
        for name in self.names:
            ours, theirs = precise(student[name]), precise(teacher[name])
            found = torch.stack([self._align(ours, theirs, t) for t in self.temperatures]).sum(0)
            probs = theirs.softmax(1)
            samples, classes = _share_up_to_median(probs.amax(1)), _share_up_to_median(probs.sum(0))
            losses[f"{name}.instance"] = samples * found[0]
            losses[f"{name}.batch"] = samples * found[1]
            losses[f"{name}.class"] = classes * found[2]
        return losses

    def _align(self, ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
        """Instance, batch and class alignment at one temperature."""
        a, b = ((logits / temperature).softmax(1) for logits in (ours, theirs))
        batch = (inner_products(b, b) - inner_products(a, a)).square().sum() / len(a)
        classes = (inner_products(b.T, b.T) - inner_products(a.T, a.T)).square().sum() / a.shape[1]
        if self.standardize:
            ours, theirs = standardize(ours), standardize(theirs)
        return torch.stack([kl_divergence(ours, theirs, temperature), batch, classes])


def _share_up_to_median(values: Tensor) -> Tensor:
    """Which share of `(N,)` values is at most their median."""
    return (values <= values.quantile(0.5)).to(values.dtype).mean()
