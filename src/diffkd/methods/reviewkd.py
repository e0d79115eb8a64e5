"""ReviewKD: Distilling Knowledge via Knowledge Review (Chen et al., CVPR 2021, arXiv 2104.09044)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.maps import matched, shrink, valid_at
from diffkd.maths.layers import conv, norm, without_void
from diffkd.maths.losses import check_positive, precise, squared_error
from diffkd.methods.base import Method, Pair, Setup, module_key, needed_features

LEVELS = (4, 2, 1)


class ReviewKD(Method):
    """Each of the teacher's maps is matched by the student's of that stage and all deeper ones, fused.

    Chen et al., CVPR 2021, arXiv 2104.09044. From the deepest stage to the first, the student's map
    passes a 1x1 convolution, is fused with the deeper stages' by an attention over the two, and passes
    a 3x3 convolution into the teacher's channels. With P_n the mean over a grid of n x n cells, the loss
    of a stage is

        kd = (mse + mse(P_4) / 2 + mse(P_2) / 4 + mse(P_1) / 8) / (1 + 1/2 + 1/4 + 1/8),

    without the grids that are no smaller than the map. For CIFAR-100 the weight is 5 (ResNet-32x4 to
    ResNet-8x4; 0.6 to 8 elsewhere), for ImageNet 1, warmed up over 20 epochs, which is left out here.
    The paper's last stage is the pooled feature in front of the classifier. Where the teacher's map is
    the larger, it is averaged down, rather than the student's blown up.

    Use it with convolutional networks that have maps of several resolutions; its fusion makes a
    step dearer than that of most others.

    Args:
        setup: what the run taps, in the order of the stages.
        width: channels in which stages are fused; None takes the student's last, 512 at most.

    Raises:
        UserError: no feature is tapped, one is not a map, or the width is impossible.

    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "reviewkd", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['reviewkd.0.kd']
    """

    stages, uses_logits = "all", False
    weight = 5.0

    def __init__(self, setup: Setup, *, width: int | None = None) -> None:
        super().__init__()
        self.pairs = needed_features(setup, "reviewkd")
        for pair in self.pairs:
            if pair.student.spatial_dims != 2:
                raise UserError(
                    f"method 'reviewkd', tap '{pair.name}': fuses and pools maps (C, H, W), "
                    f"not {pair.student.shape}; tap feature maps, or choose method 'fitnet'"
                )
        if width is None:
            width = min(512, self.pairs[-1].student.channels)
        check_positive(width=width)
        self.fusions = nn.ModuleDict(
            {module_key(pair.name): Fusion(pair, width, pair is self.pairs[-1]) for pair in self.pairs}
        )

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The hierarchical distance, by pair."""
        losses: dict[str, Tensor] = {}
        fused: Tensor | None = None
        for pair in reversed(self.pairs):
            feature = student[pair.name]
            valid = valid_at(batch.valid, feature)
            ours, fused = self.fusions[module_key(pair.name)](feature, fused, valid)
            ours, theirs, valid = matched(ours, teacher[pair.name].detach(), batch.valid)
            losses[f"{pair.name}.kd"] = _hierarchical(precise(ours), precise(theirs), valid)
        return dict(reversed(losses.items()))


class Fusion(nn.Module):
    """A stage's map, fused with what came from the deeper stages.

    Args:
        pair: whose features these are.
        width: channels of what is fused.
        deepest: there is no deeper stage.
    """

    def __init__(self, pair: Pair, width: int, deepest: bool) -> None:
        super().__init__()
        outputs = pair.teacher.channels
        self.narrow = nn.Sequential(conv(2, pair.student.channels, width), norm(2, width))
        self.attention = None if deepest else nn.Sequential(conv(2, 2 * width, 2), nn.Sigmoid())
        self.widen = nn.Sequential(conv(2, width, outputs, 3), norm(2, outputs))

    def forward(self, feature: Tensor, deeper: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """The map in the teacher's channels, and what goes on to the stage before.

        Args:
            feature: `(B, C, H, W)`.
            deeper: what came from the deeper stage, of any size.
            valid: where the feature is, `(B, H, W)`; None for everywhere.
        """
        fused = self.narrow(without_void(feature, valid))
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            share = self.attention(torch.cat([fused, deeper], 1))
            fused = fused * share[:, :1] + deeper * share[:, 1:]
        fused = without_void(fused, valid)
        return self.widen(fused), fused


def _hierarchical(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    """Mean squared error of maps and of their means over ever coarser grids."""
    loss, weight, total = squared_error(student, teacher, valid), 1.0, 1.0
    for level in LEVELS:
        if level < min(student.shape[2:]):
            weight /= 2
            total += weight
            ours, theirs = (shrink(feature, valid, (level, level)) for feature in (student, teacher))
            loss = loss + weight * squared_error(ours, theirs, valid_at(valid, ours))
    return loss / total
