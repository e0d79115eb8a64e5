"""CWD: Channel-wise Knowledge Distillation for Dense Prediction (Shu et al., ICCV 2021, arXiv 2011.13256)."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.maps import matched
from diffkd.maths.losses import check_positive, masked_mean, precise
from diffkd.methods.base import Method, Range, Setup, check_pair, module_key, needed_maps, regressors


class CWD(Method):
    """Where each channel is strong: its softmax over the positions, matched by KL divergence.

    Shu et al., ICCV 2021, arXiv 2011.13256. With phi(x)_ci the softmax of channel c over the valid
    positions i of a picture, at a temperature T, the loss is the mean over pictures and channels of

        kd = T^2 KL(phi(teacher)_c || phi(student)_c).

    For segmentation, on the map of class scores with weight 3 and T 4 (the default). On feature maps the
    student's passes a 1x1 convolution first; the paper's weight there is 50, so the loss is scaled by
    50 / 3. For detection on the levels of the pyramid (published: T 1 and weight 5, which is 0.3 here).

    Use it as the cheap baseline of segmentation: on class scores it trains nothing of its own. On
    the levels of a pyramid it serves detection.

    Args:
        setup: what the run taps.
        temperature: T.
        on: "scores" or "features"; None takes class scores where they are tapped, else features.

    Raises:
        UserError: nothing is tapped, a tap gives no map, or the temperature is impossible.

    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Conv2d(c, 5, 1))
    >>> distiller = Distiller(net(4), net(8), {"": ""}, "cwd", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['cwd.output.kd']
    """

    stages = "all"
    weight = 3.0
    search = (Range("temperature", 1.0, 10.0),)

    def __init__(
        self, setup: Setup, *, temperature: float = 4.0, on: Literal["scores", "features"] | None = None
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        choices = {"scores": setup.logits, "features": setup.features, None: setup.logits or setup.features}
        self.temperature, self.pairs = temperature, choices[on]
        if not self.pairs:
            raise UserError(f"method 'cwd' needs a map of {on or 'class scores or features'}; set taps")
        for pair in self.pairs:
            check_pair(pair, "cwd")
        needed_maps(self.pairs, "cwd")
        self.regressors = regressors([pair for pair in self.pairs if not pair.is_logits])

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The divergence, by pair."""
        losses: dict[str, Tensor] = {}
        for pair in self.pairs:
            ours, theirs, valid = matched(student[pair.name], teacher[pair.name].detach(), batch.valid)
            if not pair.is_logits:
                ours = self.regressors[module_key(pair.name)](ours)
            loss = self._divergence(precise(ours), precise(theirs), valid)
            losses[f"{pair.name}.kd"] = loss if pair.is_logits else loss * (50 / 3)
        return losses

    def _divergence(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        """Mean over pictures that have a valid position, and channels."""
        ours, theirs = (_log_softmax(x / self.temperature, valid) for x in (student, teacher))
        divergence = theirs.exp() * (theirs - ours)
        known = None
        if valid is not None:
            divergence = divergence.masked_fill(~valid.flatten(1).unsqueeze(1), 0)
            known = valid.flatten(1).any(1)
        return masked_mean(divergence.sum(2), known) * self.temperature**2


def _log_softmax(feature: Tensor, valid: Tensor | None) -> Tensor:
    """`(B, C, *S)` to `(B, C, positions)`: log-probabilities over the valid positions."""
    rows = feature.flatten(2)
    if valid is not None:
        # Not minus infinity, whose differences would be nan.
        rows = rows.masked_fill(~valid.flatten(1).unsqueeze(1), torch.finfo(rows.dtype).min / 2)
    return F.log_softmax(rows, dim=2)
