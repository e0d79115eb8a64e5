"""FGD: Focal and Global Knowledge Distillation for Detectors (Yang et al., CVPR 2022, arXiv 2111.11837)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.errors import UserError, kind_of
from diffkd.features.maps import matched
from diffkd.maths.layers import pooled, without_void
from diffkd.maths.losses import check_not_negative, check_positive, precise
from diffkd.methods.base import Method, Range, Setup, module_key, needed_features, needed_maps, regressors


class FGD(Method):
    """The teacher's map where objects are and where they are not, apart; its attention; its relations.

    Yang et al., CVPR 2022, arXiv 2111.11837. With F the maps (the student's after a 1x1 convolution where
    the channels differ), S = HW softmax over positions of mean_c |F| / T the spatial attention,
    A = C softmax over channels of mean_hw |F| / T the channels', the losses of a level, each a sum over
    channels and valid positions and a mean over pictures, are

        foreground = alpha sum M S_t A_t (F_t - F_s)^2, M 1 / (cells of the smallest box there)
        background = beta sum N S_t A_t (F_t - F_s)^2, N 1 / (cells outside all boxes)
        attention = gamma (sum |S_t - S_s| + sum |A_t - A_s|)
        relation = lambda sum (R(F_t) - R(F_s))^2,

    R being a global context block of each side, trained along. For detectors of any kind, on the levels
    of their pyramids; it needs boxes: targets as dicts with `boxes` (x1, y1, x2, y2) in pixels of the
    picture that the model saw. The defaults are those of RetinaNet (two-stage detectors: 5e-5, 2.5e-5,
    5e-5, 5e-7; FCOS: 1.6e-3, 8e-4, 8e-4, 8e-6 at T 0.8), and 1 for the whole.

    Use it for detection with boxes, where small objects would drown in the background.

    Args:
        setup: what the run taps.
        foreground: alpha.
        background: beta.
        attention: gamma.
        relation: lambda.
        temperature: T.

    Raises:
        UserError: no feature map is tapped, an option is impossible, or (in the forward pass) the targets
            are no dicts with boxes.

    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Conv2d(c, 5, 1))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "fgd", torch.rand(1, 3, 8, 8))
    >>> batch = Batch(torch.rand(1, 3, 8, 8), [{"boxes": torch.tensor([[1.0, 1.0, 5.0, 4.0]])}])
    >>> sorted(distiller(batch))
    ['fgd.0.attention', 'fgd.0.background', 'fgd.0.foreground', 'fgd.0.relation']
    """

    stages, uses_logits = "all", False
    search = (Range("temperature", 0.2, 2.0),)

    def __init__(
        self,
        setup: Setup,
        *,
        foreground: float = 1e-3,
        background: float = 5e-4,
        attention: float = 1e-3,
        relation: float = 5e-6,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        self.weights = {
            "foreground": foreground,
            "background": background,
            "attention": attention,
            "relation": relation,
        }
        check_not_negative(**self.weights)
        check_positive(temperature=temperature)
        self.temperature, self.pairs = temperature, needed_features(setup, "fgd")
        needed_maps(self.pairs, "fgd")
        self.regressors = regressors(self.pairs, always=False)
        self.contexts = nn.ModuleDict()
        for pair in self.pairs:
            blocks = [Context(pair.teacher.channels) for _ in range(2)]
            self.contexts[module_key(pair.name)] = nn.ModuleList(blocks)

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The four losses, by pair."""
        losses: dict[str, Tensor] = {}
        for pair in self.pairs:
            ours, theirs, valid = matched(student[pair.name], teacher[pair.name].detach(), batch.valid)
            key = module_key(pair.name)
            ours = without_void(precise(self.regressors[key](ours)), valid)
            theirs = precise(theirs)
            if valid is None:
                valid = torch.ones_like(theirs[:, 0], dtype=torch.bool)
            found = self._focal(ours, theirs, valid, *boxes_of(batch))
            contexts: Any = self.contexts[key]
            relations = [context(f, valid) for context, f in zip(contexts, (ours, theirs), strict=True)]
            difference = without_void(relations[1] - relations[0], valid)
            found["relation"] = difference.square().sum() / _count(valid)
            losses |= {f"{pair.name}.{name}": self.weights[name] * loss for name, loss in found.items()}
        return losses

    def _focal(
        self, ours: Tensor, theirs: Tensor, valid: Tensor, boxes: list[Tensor], frame: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Foreground, background and attention, without their weights."""
        attentions = [self._attention(feature, valid) for feature in (ours, theirs)]
        (space_s, channel_s), (space_t, channel_t) = attentions
        size = (valid.shape[1], valid.shape[2])
        objects = torch.stack([shares(box.to(theirs), frame, size) for box in boxes]) * valid
        outside = ((objects == 0) & valid).to(theirs)
        outside = outside / outside.sum((1, 2), keepdim=True).clamp(min=1)
        error = (theirs - ours).square() * channel_t[..., None, None] * space_t.unsqueeze(1)
        error, some = error.sum(1), valid.flatten(1).any(1, keepdim=True)
        attention = (space_s - space_t).abs().sum() + ((channel_s - channel_t).abs() * some).sum()
        count = _count(valid)
        return {
            "foreground": (error * objects).sum() / count,
            "background": (error * outside).sum() / count,
            "attention": attention / count,
        }

    def _attention(self, feature: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Of the positions `(B, H, W)`, and of the channels `(B, C)`."""
        strength = feature.abs()
        space = _softmax(strength.mean(1) / self.temperature, valid)
        channels = (pooled(strength, valid) / self.temperature).softmax(1)
        return space * valid.sum((1, 2), keepdim=True), channels * feature.shape[1]


class Context(nn.Module):
    """A global context block: what all positions say together is added to each.

    Args:
        channels: C, of what goes in and comes out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        middle = max(1, channels // 2)
        self.mask = nn.Conv2d(channels, 1, 1)
        last = nn.Linear(middle, channels)
        # At the start nothing is added.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.add = nn.Sequential(nn.Linear(channels, middle), nn.LayerNorm(middle), nn.ReLU(), last)

    def forward(self, feature: Tensor, valid: Tensor) -> Tensor:
        """`(B, C, H, W)`, of which `(B, H, W)` is valid, to the same shape."""
        share = _softmax(precise(self.mask(feature))[:, 0], valid)
        context = (feature * share.unsqueeze(1)).sum((2, 3))
        added: Tensor = precise(self.add(context))
        return feature + added[..., None, None]


def boxes_of(batch: Batch) -> tuple[list[Tensor], tuple[int, int]]:
    """Each picture's boxes in pixels, `(n, 4)`, and the size (H, W) of the padded pictures.

    Raises:
        UserError: the targets are no dicts with boxes.
    """
    targets = batch.targets
    if not isinstance(targets, list) or not all(isinstance(t, Mapping) and "boxes" in t for t in targets):
        raise UserError(
            f"method 'fgd' needs a detector's targets, dicts with boxes; the batch's are {kind_of(targets)}"
        )
    if batch.valid is not None:
        height, width = batch.valid.shape[1:]
    else:
        height, width = (max(image.shape[axis] for image in batch.images) for axis in (1, 2))
    return [target["boxes"] for target in targets], (height, width)


def shares(boxes: Tensor, frame: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """1 / (cells of the smallest box over each position), `(H, W)`; 0 where there is no box.

    Args:
        boxes: `(n, 4)` in pixels.
        frame: (H, W) of the picture, in pixels.
        size: (H, W) of the map.

    >>> shares(torch.tensor([[0.0, 0.0, 8.0, 6.0]]), (16, 16), (2, 4))
    tensor([[0.1667, 0.1667, 0.1667, 0.0000],
            [0.1667, 0.1667, 0.1667, 0.0000]])
    """
    height, width = size
    scaled = boxes * boxes.new_tensor([width, height] * 2) / boxes.new_tensor([*reversed(frame)] * 2)
    low, high = scaled[:, :2].floor(), scaled[:, 2:].ceil()
    area = (high - low + 1).prod(1)
    x, y = (torch.arange(n, device=boxes.device) for n in (width, height))
    across = (x >= low[:, :1]) & (x <= high[:, :1])
    down = (y >= low[:, 1:]) & (y <= high[:, 1:])
    inside = down.unsqueeze(2) & across.unsqueeze(1)
    found = inside / area.view(-1, 1, 1)
    # A first one of zeros serves pictures without boxes.
    return torch.cat([found.new_zeros(1, height, width), found]).amax(0)


def _softmax(scores: Tensor, valid: Tensor) -> Tensor:
    """`(B, H, W)` over each picture's valid positions; 0 elsewhere."""
    low = scores.masked_fill(~valid, torch.finfo(scores.dtype).min).flatten(1)
    return low.softmax(1).view_as(scores).masked_fill(~valid, 0)


def _count(valid: Tensor) -> Tensor:
    """How many pictures have a valid position; 1 at least."""
    return valid.flatten(1).any(1).sum().clamp(min=1)
