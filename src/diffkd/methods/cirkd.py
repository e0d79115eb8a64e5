"""CIRKD: Cross-Image Relational Distillation for Segmentation (Yang et al., CVPR 2022, arXiv 2204.06986)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.maps import class_means, label_maps, matched, shrink, valid_at
from diffkd.maths.layers import inner_products, unit
from diffkd.maths.losses import check_not_negative, check_positive, masked_mean, precise
from diffkd.methods.base import Method, Range, Setup, module_key, needed_features, needed_maps, regressors

VERY_LOW = -1e9  # a score that softmax gives no share


class CIRKD(Method):
    """How alike each position is to those of all pictures, and to what each class looks like.

    Yang et al., CVPR 2022, arXiv 2204.06986. With features of length 1, and P the softmax of inner
    products at a temperature tau, the losses are

        pixel = mean over positions a and pictures j of KL(P_teacher(a, positions of j) || P_student)
        region = mean over positions a of KL(P_teacher(a, regions) || P_student(a, regions)).

    `pixel` compares the positions of every picture of the batch with those of every picture, each side
    in its own space, on maps averaged over cells of `pooling` positions. A region is the mean of a
    class's positions in a picture, of the teacher: those of the batch, and those remembered of the
    last ones; the student's positions pass a 1x1 convolution into the teacher's space.

    For semantic segmentation: it needs label maps. The paper's weights are 1 and 0.1, beside KD on the
    logits; tau is 0.1. Its memory also holds single pixels, and 2000 regions of each class. Memory of a
    step grows with the square of the positions of a batch.

    Use it for segmentation with label maps and several pictures a batch on each device, beside
    `kd`.

    Args:
        setup: what the run taps; it needs the number of classes.
        pixel_weight: of `pixel`.
        region_weight: of `region`.
        temperature: tau.
        pooling: positions along each side of a cell.
        memory: regions remembered of each class; 0 has no memory.

    Raises:
        UserError: no feature map is tapped, the number of classes is unknown, an option is impossible,
            or (in the forward pass) the batch carries no label maps.

    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Conv2d(c, 5, 1))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "cirkd", torch.rand(2, 3, 8, 8), num_classes=5)
    >>> sorted(distiller((torch.rand(2, 3, 8, 8), torch.randint(0, 5, (2, 8, 8)))))
    ['cirkd.0.pixel', 'cirkd.0.region']
    """

    uses_logits = False
    search = (Range("temperature", 0.05, 0.5),)

    def __init__(
        self,
        setup: Setup,
        *,
        pixel_weight: float = 1.0,
        region_weight: float = 0.1,
        temperature: float = 0.1,
        pooling: int = 2,
        memory: int = 100,
    ) -> None:
        super().__init__()
        check_not_negative(pixel_weight=pixel_weight, region_weight=region_weight, memory=memory)
        check_positive(temperature=temperature, pooling=pooling)
        if setup.num_classes is None:
            raise UserError("method 'cirkd' compares positions with classes; give num_classes")
        self.pixel_weight, self.region_weight = pixel_weight, region_weight
        self.temperature, self.pooling, self.classes = temperature, pooling, setup.num_classes
        self.pairs = needed_features(setup, "cirkd")
        needed_maps(self.pairs, "cirkd")
        self.regressors = regressors(self.pairs)
        self.memories = nn.ModuleDict(
            {
                module_key(pair.name): Regions(self.classes, memory, pair.teacher.channels)
                for pair in self.pairs
            }
        )

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Both relations, by pair."""
        losses: dict[str, Tensor] = {}
        for pair in self.pairs:
            key = module_key(pair.name)
            ours, theirs, valid = matched(student[pair.name], teacher[pair.name].detach(), batch.valid)
            pixel = self._pixel(precise(ours), precise(theirs), valid)
            labels, known = label_maps(batch, ours, self.classes)
            regions, there = self.memories[key](*class_means(precise(theirs), labels, known, self.classes))
            aligned = precise(self.regressors[key](ours))
            scores = [self._scores(_rows(x), unit(regions)) for x in (aligned, precise(theirs))]
            region = _divergence(scores[0], scores[1], there.expand(len(ours), -1))
            losses[f"{pair.name}.pixel"] = self.pixel_weight * pixel
            counted = known.flatten(1) & there.any()
            losses[f"{pair.name}.region"] = self.region_weight * masked_mean(region, counted)
        return losses

    def _pixel(self, ours: Tensor, theirs: Tensor, valid: Tensor | None) -> Tensor:
        """Mean over all positions of all pictures, and all pictures that they are compared with."""
        size = (-(-ours.shape[2] // self.pooling), -(-ours.shape[3] // self.pooling))
        rows = [_rows(shrink(feature, valid, size)) for feature in (ours, theirs)]
        where = valid_at(valid, shrink(ours, valid, size))
        if where is None:
            where = torch.ones_like(rows[0][..., 0], dtype=torch.bool)
        where = where.flatten(1)
        # (1, B, N, C) and (B, 1, N, C): every picture i against every picture j, (B, B, N, N).
        scores = [self._scores(row.unsqueeze(1), row.unsqueeze(0)) for row in rows]
        counted = where.unsqueeze(1) & where.any(1).view(1, -1, 1)
        divergence = _divergence(scores[0], scores[1], where.unsqueeze(0).expand(len(where), -1, -1))
        return masked_mean(divergence, counted)

    def _scores(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner products of all rows `(..., N, C)` and `(..., M, C)`, sharpened: `(..., N, M)`."""
        return inner_products(a, b) / self.temperature


class Regions(nn.Module):
    """The last regions of each class.

    Args:
        classes: K.
        size: M, regions remembered of each class.
        channels: C.
    """

    vectors: Tensor
    count: Tensor

    def __init__(self, classes: int, size: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(classes, size, channels))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))

    def forward(self, means: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """All regions to compare with; in training, a batch's mean of each class is remembered after.

        Args:
            means: of each picture's classes, `(B, K, C)`.
            there: which of them a picture has, `(B, K)`.

        Returns:
            `(R, C)`, and which of them hold something, `(R,)`.
        """
        size = self.vectors.shape[1]
        used = torch.arange(size, device=means.device) < self.count.unsqueeze(1)
        old = self.vectors.to(means.dtype).flatten(0, 1)
        regions = torch.cat([means.flatten(0, 1), old]), torch.cat([there.flatten(), used.flatten()])
        if self.training and size:
            self._remember(means, there)
        return regions

    @torch.no_grad()
    def _remember(self, means: Tensor, there: Tensor) -> None:
        """Puts the mean over a batch's pictures in the place of each class's oldest region."""
        size, classes = self.vectors.shape[1], torch.arange(len(self.count), device=means.device)
        new = (means * there.unsqueeze(2)).sum(0) / there.sum(0).clamp(min=1).unsqueeze(1)
        place = self.count % size
        old = self.vectors[classes, place]
        kept = torch.where(there.any(0).unsqueeze(1), new.to(old.dtype), old)
        self.vectors = self.vectors.index_put((classes, place), kept)
        self.count += there.any(0)


def _rows(feature: Tensor) -> Tensor:
    """`(B, C, H, W)` to `(B, positions, C)` of length 1."""
    return unit(feature.flatten(2).mT)


def _divergence(ours: Tensor, theirs: Tensor, where: Tensor) -> Tensor:
    """KL divergence of softmax rows: scores `(..., N, M)` and `(..., M)`, which count, to `(..., N)`."""
    void = ~where.unsqueeze(-2)
    a, b = (F.log_softmax(scores.masked_fill(void, VERY_LOW), dim=-1) for scores in (ours, theirs))
    return (b.exp() * (b - a)).masked_fill(void, 0).sum(-1)
