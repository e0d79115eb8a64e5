"""MGD: Masked Generative Distillation (Yang et al., ECCV 2022, arXiv 2205.01529)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.maps import matched
from diffkd.maths.layers import conv, without_void
from diffkd.maths.losses import precise, squared_error
from diffkd.methods.base import Method, Pair, Range, Setup, module_key, needed_features


class MGD(Method):
    """The teacher's whole feature, generated from the student's with random positions left out.

    Yang et al., ECCV 2022, arXiv 2205.01529. With M zero at a random share of the positions (drawn for
    each sample, the same for all channels) and one elsewhere, A a 1x1 convolution where the channels
    differ, and G two 3x3 convolutions with a ReLU between them, the loss is

        kd = mean((G(M A(student)) - teacher)^2).

    The paper has no CIFAR-100 runs, and its code takes the sum over channels and positions: a weight of
    7e-5 there (ImageNet) is 7e-5 * C * H * W here, 1.76 for the (512, 7, 7) of a ResNet-34, which is the
    default. For segmentation (2e-5 there) and detection (2e-5, two-stage detectors 5e-7) it grows with
    the map in the same way. That code
    also leaves out channels rather than positions for classification, a share of 0.15; for detection
    and segmentation it leaves out positions, as the paper has it, a share of 0.45 to 0.75.

    Use it where one method is to serve classification, segmentation and detection: it needs neither
    labels nor class scores.

    Args:
        setup: what the run taps.
        mask_ratio: lambda, the share of positions that is left out, from 0 to below 1.

    Raises:
        UserError: no feature is tapped, one is a vector, the two of a pair are of different kinds, or
            the ratio is impossible.

    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "mgd", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['mgd.0.kd']
    """

    stages, uses_logits = "last", False
    weight = 1.76
    search = (Range("mask_ratio", 0.2, 0.8),)

    def __init__(self, setup: Setup, *, mask_ratio: float = 0.5) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise UserError(f"mask_ratio={mask_ratio}: from 0 to below 1")
        self.mask_ratio, self.pairs = mask_ratio, needed_features(setup, "mgd")
        self.align, self.generation = nn.ModuleDict(), nn.ModuleDict()
        for pair in self.pairs:
            key = module_key(pair.name)
            self.align[key], self.generation[key] = _layers(pair)

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The distance, by pair."""
        losses: dict[str, Tensor] = {}
        for pair in self.pairs:
            key = module_key(pair.name)
            ours, theirs, valid = matched(student[pair.name], teacher[pair.name].detach(), batch.valid)
            drawn = torch.rand(len(ours), 1, *ours.shape[2:], device=ours.device)
            aligned = without_void(self.align[key](ours), valid)
            generated = self.generation[key](aligned * (drawn >= self.mask_ratio))
            losses[f"{pair.name}.kd"] = squared_error(precise(generated), precise(theirs), valid)
        return losses


def _layers(pair: Pair) -> tuple[nn.Module, nn.Module]:
    """What makes the channels equal, and what generates."""
    dims, inputs, outputs = pair.student.spatial_dims, pair.student.channels, pair.teacher.channels
    if dims == 0:
        raise UserError(
            f"method 'mgd', tap '{pair.name}': a vector has no positions to leave out; "
            "tap a feature map, or choose method 'fitnet'"
        )
    align = nn.Identity() if inputs == outputs else conv(dims, inputs, outputs)
    return align, nn.Sequential(conv(dims, outputs, outputs, 3), nn.ReLU(), conv(dims, outputs, outputs, 3))
