"""IFVD: Intra-class Feature Variation Distillation for Semantic Segmentation (Wang et al., ECCV 2020)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.maps import class_means, label_maps, matched
from diffkd.maths.layers import unit
from diffkd.maths.losses import masked_mean, precise
from diffkd.methods.base import Method, Setup, needed_features, needed_maps


class IFVD(Method):
    """How alike each position is to its class, for the student as for the teacher.

    Wang et al., ECCV 2020 (not on arXiv). A class's prototype is the mean feature of its positions in
    a picture; with v the cosine of each position's feature with its class's prototype, the loss is

        kd = mean((v(student) - v(teacher))^2)

    over the positions that have a label. For semantic segmentation: it needs label maps, which are
    brought to the feature's size by the nearest label. Its weight is 200, beside KD on the logits.

    Use it for segmentation with label maps, beside `kd`.

    Args:
        setup: what the run taps; it needs the number of classes.

    Raises:
        UserError: no feature map is tapped, the number of classes is unknown, or (in the forward pass)
            the batch carries no label maps.

    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Conv2d(c, 5, 1))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "ifvd", torch.rand(2, 3, 8, 8), num_classes=5)
    >>> sorted(distiller((torch.rand(2, 3, 8, 8), torch.randint(0, 5, (2, 8, 8)))))
    ['ifvd.0.kd']
    """

    uses_logits = False
    weight = 200.0

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        if setup.num_classes is None:
            raise UserError("method 'ifvd' compares positions with their class; give num_classes")
        self.classes = setup.num_classes
        self.names = [pair.name for pair in needed_features(setup, "ifvd")]
        needed_maps(setup.features, "ifvd")

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The difference of variation, by pair."""
        losses: dict[str, Tensor] = {}
        for name in self.names:
            ours, theirs, _ = matched(precise(student[name]), precise(teacher[name].detach()), batch.valid)
            labels, known = label_maps(batch, ours, self.classes)
            ours, theirs = (self._variation(feature, labels, known) for feature in (ours, theirs))
            losses[f"{name}.kd"] = masked_mean((ours - theirs).square(), known.flatten(1))
        return losses

    def _variation(self, feature: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, positions)`: cosine of each position with its class's prototype."""
        means, _ = class_means(feature, labels, known, self.classes)
        own = labels.flatten(1).unsqueeze(2).expand(-1, -1, means.shape[2])
        prototypes = torch.gather(means, 1, own)
        return (unit(feature.flatten(2).mT) * unit(prototypes)).sum(2)
