"""Af-DCD: Augmentation-free Dense Contrastive Distillation for Segmentation (Fan et al., NeurIPS 2023)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.maps import matched
from diffkd.maths.layers import conv, unit, without_void
from diffkd.maths.losses import check_not_negative, check_positive, masked_mean, precise, squared_error
from diffkd.methods.base import Method, Range, Setup, module_key, needed_features, needed_maps, regressors


class AfDCD(Method):
    """A position of the student tells the teacher's of the same place from those around it.

    Fan et al., NeurIPS 2023 (Augmentation-free Dense Contrastive Knowledge Distillation). The student's
    map, through a 1x1 convolution and with a random share of its positions left out, is rebuilt by two
    3x3 convolutions into R, as in MGD. Both maps are cut into patches of P x P positions. With s and t
    the vectors of R and of the teacher, brought to length 1, and tau a temperature, the losses are

        reconstruction = mean((R - teacher)^2)
        spatial = mean of -log(exp(s_i t_i / tau) / sum over positions j of the patch exp(s_i t_j / tau))
        channel = the same of the channels: a group of them in a patch against the patch's other groups.

    For semantic segmentation; no labels, no memory and no second view are needed. This is the
    method as its paper describes it in short, not a copy of the published code, which may differ in its
    details. Patches of 4, 4 groups, tau 0.5 and the weights 1, 0.1 and 0.1 are chosen here: the paper's
    differ by data set.

    Use it for segmentation where there are no label maps, or a second view of each picture is too
    dear: the teacher's last map is all it needs.

    Args:
        setup: what the run taps.
        patch: P.
        groups: of channels; it must divide the teacher's.
        mask_ratio: share of the positions that is left out, from 0 to below 1.
        temperature: tau.
        spatial: weight of `spatial`.
        channel: weight of `channel`.

    Raises:
        UserError: no feature map is tapped, the groups do not divide the teacher's channels, or an option
            is impossible.

    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Conv2d(c, 5, 1))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "afdcd", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['afdcd.0.channel', 'afdcd.0.reconstruction', 'afdcd.0.spatial']
    """

    uses_logits = False
    search = (Range("temperature", 0.1, 1.0),)

    def __init__(
        self,
        setup: Setup,
        *,
        patch: int = 4,
        groups: int = 4,
        mask_ratio: float = 0.5,
        temperature: float = 0.5,
        spatial: float = 0.1,
        channel: float = 0.1,
    ) -> None:
        super().__init__()
        check_positive(patch=patch, groups=groups, temperature=temperature)
        check_not_negative(spatial=spatial, channel=channel)
        if not 0 <= mask_ratio < 1:
            raise UserError(f"mask_ratio={mask_ratio}: from 0 to below 1")
        self.patch, self.groups, self.mask_ratio = patch, groups, mask_ratio
        self.temperature, self.spatial, self.channel = temperature, spatial, channel
        self.pairs = needed_features(setup, "afdcd")
        needed_maps(self.pairs, "afdcd")
        self.regressors, self.generation = regressors(self.pairs), nn.ModuleDict()
        for pair in self.pairs:
            width = pair.teacher.channels
            if width % groups:
                raise UserError(f"method 'afdcd', tap '{pair.name}': groups={groups} does not divide {width}")
            layers = conv(2, width, width, 3), nn.ReLU(), conv(2, width, width, 3)
            self.generation[module_key(pair.name)] = nn.Sequential(*layers)

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Reconstruction and both contrasts, by pair."""
        losses: dict[str, Tensor] = {}
        for pair in self.pairs:
            key = module_key(pair.name)
            ours, theirs, valid = matched(student[pair.name], teacher[pair.name].detach(), batch.valid)
            drawn = torch.rand(len(ours), 1, *ours.shape[2:], device=ours.device)
            aligned = without_void(self.regressors[key](ours), valid) * (drawn >= self.mask_ratio)
            rebuilt, theirs = precise(self.generation[key](aligned)), precise(theirs)
            losses[f"{pair.name}.reconstruction"] = squared_error(rebuilt, theirs, valid)
            if valid is None:
                valid = torch.ones_like(theirs[:, 0], dtype=torch.bool)
            rebuilt = without_void(rebuilt, valid)
            used = patches(valid.unsqueeze(1).to(theirs.dtype), self.patch).squeeze(1) > 0
            a, b = (patches(x, self.patch) for x in (rebuilt, theirs))
            losses[f"{pair.name}.spatial"] = self.spatial * self._contrast(a.mT, b.mT, used)
            there = used.any(1, keepdim=True).expand(-1, self.groups)
            a, b = (x.reshape(len(x), self.groups, -1) for x in (a, b))
            losses[f"{pair.name}.channel"] = self.channel * self._contrast(a, b, there)
        return losses

    def _contrast(self, ours: Tensor, theirs: Tensor, used: Tensor) -> Tensor:
        """Of N vectors a patch, `(P, N, D)`, those that are used `(P, N)`; mean over them."""
        scores = unit(ours) @ unit(theirs).mT / self.temperature
        # A score that softmax gives no share; not minus infinity, whose gradient would be nan.
        scores = scores.masked_fill(~used.unsqueeze(1), -1e9)
        own = F.log_softmax(scores, dim=2).diagonal(dim1=1, dim2=2)
        return masked_mean(-own, used)


def patches(feature: Tensor, size: int) -> Tensor:
    """`(B, C, H, W)` in patches of `size` x `size`, zeros beyond the edges: `(patches, C, size * size)`.

    >>> patches(torch.rand(2, 3, 5, 8), 4).shape
    torch.Size([8, 3, 16])
    """
    height, width = feature.shape[2:]
    padded = F.pad(feature, (0, -width % size, 0, -height % size))
    cut = F.unfold(padded, size, stride=size)  # (B, C * size * size, patches)
    return cut.mT.reshape(-1, feature.shape[1], size * size)
