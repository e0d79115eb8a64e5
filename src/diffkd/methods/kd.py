"""KD: Distilling the Knowledge in a Neural Network (Hinton et al., 2015, arXiv 1503.02531)."""

from collections.abc import Mapping

from torch import Tensor

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.maps import matched
from diffkd.maths.losses import binary_divergence, kl_divergence, precise, standardize
from diffkd.methods.base import Method, Range, Setup, needed_logits, temperature_for


class KD(Method):
    """KL divergence of the teacher's softened class scores from the student's, times temperature squared.

    Hinton et al., 2015, arXiv 1503.02531; standardized scores: Sun et al., CVPR 2024, arXiv 2403.01427.
    With p the softmax of the class scores divided by tau, the loss is the mean over samples of

        kd = tau^2 KL(p_teacher || p_student).

    As usually published for CIFAR-100: temperature 4, weight 0.9 with 0.1 for the labels' loss;
    standardized: temperature 2, weight 9 with 0.1 for the labels' loss. For ImageNet (ResNet-34 to
    ResNet-18): temperature 1, weights 0.5 and 0.5; standardized: temperature 2, 9 and 0.1.

    Serves classification, and class scores per position (segmentation), of which void ones are left out.
    Where classes do not exclude one another (`task.multi_label`) the divergence is that of each class's
    yes and no, a mean over classes.

    Use it first: it needs class scores alone, serves models of any kind, costs next to nothing, and
    is what every other method is measured against.

    Args:
        setup: what the run taps.
        temperature: tau, which the scores are divided by; None is 4 for one set of scores a sample, 1
            for scores per position, as dense prediction is published, and 2 for standardized ones.
        standardize: brings each sample's scores to mean 0 and standard deviation 1 first, so that the
            student need not match their range; the weight is 9 where none is given.

    Raises:
        UserError: no class scores are tapped, or an option is impossible.

    >>> import torch
    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"": ""}, "kd", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['kd.output.kd']
    """

    stages = "none"
    binary = True
    weight = 0.9
    standardized_weight = 9.0
    search = (Range("temperature", 1.0, 10.0),)

    def __init__(self, setup: Setup, *, temperature: float | None = None, standardize: bool = False) -> None:
        super().__init__()
        pairs = needed_logits(setup, "kd", standardized=standardize)
        self.temperatures = {
            pair.name: temperature_for(pair, temperature, standardized=standardize) for pair in pairs
        }
        if standardize and setup.independent:
            raise UserError("method 'kd': standardize=true compares classes, which task.multi_label does not")
        self.standardize = standardize
        self.divergence = binary_divergence if setup.independent else kl_divergence

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The divergence, by pair."""
        losses: dict[str, Tensor] = {}
        for name, temperature in self.temperatures.items():
            ours, theirs, valid = matched(precise(student[name]), precise(teacher[name]), batch.valid)
            if self.standardize:
                ours, theirs = standardize(ours), standardize(theirs)
            losses[f"{name}.kd"] = self.divergence(ours, theirs, temperature, valid)
        return losses
