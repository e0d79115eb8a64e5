"""LD: Localization Distillation for Dense Object Detection (Zheng et al., CVPR 2022, arXiv 2102.12252)."""

from collections.abc import Mapping

from torch import Tensor

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.maps import matched
from diffkd.maths.losses import check_positive, kl_divergence, precise
from diffkd.methods.base import Method, Range, Setup, needed_features, needed_maps


class LD(Method):
    """Where the sides of boxes may lie: the student's distributions as the teacher's.

    Zheng et al., CVPR 2022, arXiv 2102.12252. A head that gives each side of a box as a distribution over
    bins (as GFL does) has maps of 4 * bins channels; with P the softmax over the bins of a side at the
    temperature T, the loss is the mean over valid positions and sides of

        kd = T^2 KL(P_teacher || P_student).

    The paper takes it where the head is assigned an object, with a weight of 0.25 (as here), and around
    it; here every valid position counts, so that no head's assignment is needed. For detectors with such
    a head alone: tap its layer of box distributions. A head of plain distances, as FCOS and RetinaNet of
    torchvision have, has no distributions to distil.

    Use it for detectors whose heads give boxes as distributions, beside a method on their pyramids.

    Args:
        setup: what the run taps.
        bins: of each side's distribution (GFL: 17).
        temperature: T.

    Raises:
        UserError: no map is tapped, one has not 4 * bins channels, or an option is impossible.

    >>> import torch
    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Conv2d(c, 4 * 6, 1), nn.Flatten())
    >>> methods = {"ld": {"bins": 6}}
    >>> distiller = Distiller(net(4), net(8), {"1": "1"}, methods, torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['ld.1.kd']
    """

    uses_logits = False
    weight = 0.25
    search = (Range("temperature", 1.0, 20.0),)

    def __init__(self, setup: Setup, *, bins: int = 17, temperature: float = 10.0) -> None:
        super().__init__()
        check_positive(bins=bins, temperature=temperature)
        self.bins, self.temperature = bins, temperature
        self.names = [pair.name for pair in needed_features(setup, "ld")]
        needed_maps(setup.features, "ld")
        for pair in setup.features:
            for side, feature in (("student", pair.student), ("teacher", pair.teacher)):
                if feature.channels != 4 * bins:
                    raise UserError(
                        f"method 'ld', tap '{pair.name}': the {side} gives {feature.channels} channels, not "
                        f"distributions of 4 sides over {bins} bins; tap a head's layer of box distributions "
                        "(GFL), or choose 'pkd'"
                    )

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The divergence, by pair."""
        losses: dict[str, Tensor] = {}
        for name in self.names:
            ours, theirs, valid = matched(student[name], teacher[name].detach(), batch.valid)
            # A side's distribution is a sample of its own: (B, 4 * bins, H, W) to (4 B, bins, H, W).
            ours, theirs = (precise(x).reshape(-1, self.bins, *x.shape[2:]) for x in (ours, theirs))
            sides = None if valid is None else valid.repeat_interleave(4, 0)
            losses[f"{name}.kd"] = kl_divergence(ours, theirs, self.temperature, sides)
        return losses
