"""OFD: A Comprehensive Overhaul of Feature Distillation (Heo et al., ICCV 2019, arXiv 1904.01866)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.features.maps import matched
from diffkd.maths.layers import conv, norm, without_void
from diffkd.maths.losses import check_positive, precise
from diffkd.methods.base import Method, Pair, Setup, module_key, needed_features


class OFD(Method):
    """Squared distance to the teacher's feature, but not where both say "no" and the student more so.

    Heo et al., ICCV 2019, arXiv 1904.01866. With S the student's feature after a 1x1 convolution and
    BatchNorm, T the teacher's after the margin ReLU max(x, m), m a channel's mean negative response,
    and l the number of the stage, of L, the loss of a stage is

        kd = 1 / (divisor * 2^(L - l)) * mean over samples of
             sum over channels and positions of (S - T)^2 where S > T or T > 0.

    These are the published scales: weight 1, for CIFAR-100 with the divisor 1,000, for ImageNet with
    10,000. The published code runs the teacher in training mode, so that its BatchNorm normalizes by the
    batch's statistics; here it stays in evaluation mode unless `teacher_training` is set.

    The paper taps features before their ReLU, and computes m from the BatchNorm in front of it. Here
    the model may be any, so m is the mean of the negative responses seen in training so far, 0 where
    there are none, as behind a ReLU; there T is the teacher's plain feature. To have what the paper has,
    tap layers in front of a ReLU.

    Use it with convolutional networks whose maps can be tapped in front of a ReLU.

    Args:
        setup: what the run taps, in the order of the stages.
        divisor: of the sums, see above.
        teacher_training: the teacher's BatchNorm uses each batch's statistics, for all methods of the run;
            its own stay as they are.

    Raises:
        UserError: no feature is tapped, the two of a pair are of different kinds, or the divisor is
            impossible.

    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "ofd", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['ofd.0.kd']
    """

    stages, uses_logits = "all", False

    def __init__(self, setup: Setup, *, divisor: float = 1000.0, teacher_training: bool = False) -> None:
        super().__init__()
        check_positive(divisor=divisor)
        self.divisor, self.batch_statistics = divisor, teacher_training
        self.pairs = needed_features(setup, "ofd")
        self.connectors = nn.ModuleDict({module_key(pair.name): Connector(pair) for pair in self.pairs})

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The partial distance, by pair."""
        losses: dict[str, Tensor] = {}
        for stage, pair in enumerate(self.pairs, start=1):
            features = matched(student[pair.name], teacher[pair.name].detach(), batch.valid)
            distance = self.connectors[module_key(pair.name)](*features)
            losses[f"{pair.name}.kd"] = distance / (self.divisor * 2 ** (len(self.pairs) - stage))
        return losses


class Connector(nn.Module):
    """The student's way into the teacher's channels, and the teacher's margins.

    Args:
        pair: whose features these are.
    """

    margin: Tensor
    seen: Tensor

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        dims, channels = pair.student.spatial_dims, pair.teacher.channels
        self.layers = nn.Sequential(conv(dims, pair.student.channels, channels), norm(dims, channels))
        self.register_buffer("margin", torch.zeros(channels))
        self.register_buffer("seen", torch.zeros(channels, dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        """Sum over channels and valid positions `(B, *S)`, mean over samples."""
        teacher = precise(teacher)
        if self.training:
            self._update(teacher)
        margin = precise(self.margin).view(-1, *[1] * (teacher.dim() - 2))
        ours, target = precise(self.layers(student)), torch.maximum(teacher, margin)
        counts = (ours > target) | (target > 0)
        return without_void((ours - target).square() * counts, valid).sum() / len(ours)

    @torch.no_grad()
    def _update(self, teacher: Tensor) -> None:
        """Takes a batch's negative responses into their mean."""
        axes = [0, *range(2, teacher.dim())]
        new = (teacher < 0).sum(axes)
        self.seen += new
        change = teacher.clamp(max=0).sum(axes) - new * self.margin
        self.margin += change / self.seen.clamp(min=1)
