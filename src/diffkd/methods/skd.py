"""SKD: Structured Knowledge Distillation for Dense Prediction (Liu et al., CVPR 2019, arXiv 1903.04197)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkd.batch import Batch
from diffkd.features.maps import matched
from diffkd.maths.layers import inner_products, unit
from diffkd.maths.losses import check_positive, precise, squared_error
from diffkd.methods.base import Method, Setup, needed_features, needed_maps


class SKD(Method):
    """How alike the regions of a picture are to each other, for the student as for the teacher.

    Liu et al., CVPR 2019, arXiv 1903.04197; the pair-wise part. A map is averaged over a grid of cells
    that divides the valid part of each picture; with a_ij the cosine of cells i and j, the loss is

        kd = mean over pictures, i and j of (a_student - a_teacher)^2.

    For semantic segmentation, depth and detection. Its weight is 1, beside KD on the logits (10 in the
    paper's segmentation runs) and an adversarial part, which is left out here. The published code
    pools by half the map's size, a grid of 2 x 2, and takes maxima where the paper has means.

    Use it for segmentation beside `kd`, as the paper has it.

    Args:
        setup: what the run taps.
        grid: cells along each side.

    Raises:
        UserError: no feature map is tapped, or the grid is impossible.

    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Conv2d(c, 5, 1))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "skd", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['skd.0.kd']
    """

    uses_logits = False

    def __init__(self, setup: Setup, *, grid: int = 2) -> None:
        super().__init__()
        check_positive(grid=grid)
        self.grid = grid
        self.names = [pair.name for pair in needed_features(setup, "skd")]
        needed_maps(setup.features, "skd")

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The difference of affinities, by pair."""
        losses: dict[str, Tensor] = {}
        for name in self.names:
            ours, theirs, valid = matched(
                precise(student[name]), precise(teacher[name].detach()), batch.valid
            )
            if valid is None:
                valid = torch.ones_like(ours[:, 0], dtype=torch.bool)
            member = cells(valid, self.grid)
            count = member.sum(2, keepdim=True)
            known = count.squeeze(2) > 0
            affinities = []
            for feature in (ours, theirs):
                sums = inner_products(member.to(feature.dtype), feature.flatten(2))
                nodes = unit(sums / count.clamp(min=1))
                affinities.append(inner_products(nodes, nodes).flatten(1))
            both = (known.unsqueeze(2) & known.unsqueeze(1)).flatten(1)
            losses[f"{name}.kd"] = squared_error(affinities[0], affinities[1], both)
        return losses


def cells(valid: Tensor, grid: int) -> Tensor:
    """Which positions `(B, H, W)` belong to which cell of a grid over the valid part of each picture.

    Returns:
        `(B, grid * grid, H * W)` bool.

    >>> cells(torch.tensor([[[True, True, False]]]), 2).int().tolist()
    [[[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]]
    """
    rows, columns = _parts(valid.any(2), grid), _parts(valid.any(1), grid)
    cell = rows.unsqueeze(2) * grid + columns.unsqueeze(1)
    return (F.one_hot(cell.flatten(1), grid * grid).mT * valid.flatten(1).unsqueeze(1)).bool()


def _parts(used: Tensor, count: int) -> Tensor:
    """The part of each index `(B, L)`, of `count` equal ones between the first and the last that is used."""
    index = torch.arange(used.shape[1], device=used.device).expand_as(used)
    first = index.masked_fill(~used, used.shape[1]).amin(1, keepdim=True)
    last = index.masked_fill(~used, 0).amax(1, keepdim=True)
    length = (last - first + 1).clamp(min=1)
    return ((index - first) * count // length).clamp(0, count - 1)
