"""DKD: Decoupled Knowledge Distillation (Zhao et al., CVPR 2022, arXiv 2203.08679)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkd.batch import Batch
from diffkd.features.maps import class_labels, matched
from diffkd.maths.losses import (
    check_not_negative,
    check_positive,
    masked_mean,
    precise,
    standardize,
)
from diffkd.methods.base import (
    STANDARDIZED_TEMPERATURE,
    Method,
    Range,
    Setup,
    needed_logits,
    warn_of_two_classes,
)


class DKD(Method):
    """KD in two parts of free weight: the target class against the rest, and the rest among themselves.

    Zhao et al., CVPR 2022, arXiv 2203.08679. With b = (p_target, 1 - p_target), and q the softmax over
    the other classes, both at a temperature tau, the losses are

        target = alpha tau^2 KL(b_teacher || b_student)
        non_target = beta tau^2 KL(q_teacher || q_student).

    For CIFAR-100 (ResNet-32x4 to ResNet-8x4) alpha is 1, beta 8, the temperature 4, and the weight
    beside the labels' loss 1; with standardized scores the published command makes alpha 9 and beta 81.
    For ImageNet (ResNet-34 to ResNet-18) alpha is 1, beta 0.5, the temperature 1. The published runs
    warm the method's weight up over 20 epochs (ImageNet: 1), which is left out here. The target class
    is the label's; of class probabilities the largest; the teacher's where there are no labels. Void
    pixels of label maps are left out; maps of another size than the scores are brought to theirs.

    Use it for classification with labels where a sure teacher leaves plain `kd` little to say of
    the other classes; `beta` wants to be tuned to the pair.

    Args:
        setup: what the run taps.
        alpha: weight of the target class's part; None is 1, or 9 for standardized scores.
        beta: weight of the other classes' part; None is 8, or 81 for standardized scores.
        temperature: tau, which the scores are divided by; None is 4, or 2 for standardized scores.
        standardize: brings each sample's scores to mean 0 and standard deviation 1 first (Sun et al.,
            CVPR 2024, arXiv 2403.01427).

    Raises:
        UserError: no class scores are tapped, an option is impossible, or (in the forward pass) the
            targets are no class labels.

    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"": ""}, "dkd", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller((torch.rand(2, 3, 8, 8), torch.tensor([0, 4]))))
    ['dkd.output.non_target', 'dkd.output.target']
    """

    stages = "none"
    search = (Range("temperature", 1.0, 10.0), Range("beta", 0.5, 32.0))

    def __init__(
        self,
        setup: Setup,
        *,
        alpha: float | None = None,
        beta: float | None = None,
        temperature: float | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        usual = (9.0, 81.0, STANDARDIZED_TEMPERATURE) if standardize else (1.0, 8.0, 4.0)
        alpha, beta, temperature = (
            published if value is None else value
            for value, published in zip((alpha, beta, temperature), usual, strict=True)
        )
        check_not_negative(alpha=alpha, beta=beta)
        check_positive(temperature=temperature)
        self.alpha, self.beta = alpha, beta
        self.temperature, self.standardize = temperature, standardize
        pairs = needed_logits(setup, "dkd", standardized=standardize)
        warn_of_two_classes(pairs, "non_target")
        self.names = [pair.name for pair in pairs]

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Both parts, by pair."""
        losses: dict[str, Tensor] = {}
        for name in self.names:
            ours, theirs, _ = matched(precise(student[name]), precise(teacher[name]), batch.valid)
            labels, known = class_labels(batch, theirs)
            binary, others = (
                F.kl_div(a, b, reduction="none", log_target=True).sum(1)
                for a, b in zip(self._decouple(ours, labels), self._decouple(theirs, labels), strict=True)
            )
            scale = self.temperature**2
            losses[f"{name}.target"] = self.alpha * scale * masked_mean(binary, known)
            losses[f"{name}.non_target"] = self.beta * scale * masked_mean(others, known)
        return losses

    def _decouple(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of target and rest `(B, 2, *S)`, and of the others among themselves."""
        if self.standardize:
            logits = standardize(logits)
        log_probs = F.log_softmax(logits / self.temperature, dim=1)
        classes = labels.unsqueeze(1)
        target = log_probs.gather(1, classes)
        # Not minus infinity, whose differences would be nan.
        others = log_probs.scatter(1, classes, torch.finfo(log_probs.dtype).min)
        rest = others.logsumexp(1, keepdim=True)
        return torch.cat([target, rest], 1), others - rest
