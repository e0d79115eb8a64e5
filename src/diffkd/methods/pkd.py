"""PKD: Distillation for Detectors via Pearson Correlation (Cao et al., NeurIPS 2022, arXiv 2207.02039)."""

import torch
from torch import Tensor

from diffkd.maths.layers import without_void
from diffkd.maths.losses import squared_error
from diffkd.methods.base import Regression


class PKD(Regression):
    """Features imitated up to scale and shift of each channel.

    Cao et al., NeurIPS 2022, arXiv 2207.02039. With n(x) each channel brought to mean 0 and standard
    deviation 1 over the batch and its valid positions, the loss of each level is

        kd = mean((n(student) - n(teacher))^2) / 2,

    which is 1 minus the mean correlation of the channels. For detectors of any kind and of different
    kinds, on the levels of their pyramids; it serves other tasks too. The weight is 6 (two-stage
    teachers for one-stage students: 10). Where the channels differ in number the student's pass a
    1x1 convolution first, which the paper does without.

    Use it for detection, above all between detectors of different kinds, whose features differ in
    scale.

    Args:
        setup: what the run taps.

    Raises:
        UserError: no feature is tapped, or the two of a pair are of different kinds.

    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "pkd", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['pkd.0.kd']
    """

    stages, always = "all", False
    weight = 6.0

    def distance(self, ours: Tensor, theirs: Tensor, valid: Tensor | None) -> Tensor:
        """Of the two with each channel normalized, `(B, C, *S)`; `valid` is `(B, *S)`, None for all."""
        return squared_error(normalized(ours, valid), normalized(theirs, valid), valid) / 2


def normalized(feature: Tensor, valid: Tensor | None, eps: float = 1e-6) -> Tensor:
    """Each channel at mean 0 and deviation 1 over batch and valid positions; 0 where it does not vary.

    Args:
        feature: `(B, C, *S)`.
        valid: `(B, *S)`; None for all.
        eps: keeps the quotient finite.

    >>> normalized(torch.tensor([[[1.0, 3.0]]]), None)
    tensor([[[-0.7071,  0.7071]]])
    """
    axes = [0, *range(2, feature.dim())]
    count = feature.new_tensor(feature.numel() // feature.shape[1]) if valid is None else valid.sum()
    feature = without_void(feature, valid)
    mean = feature.sum(axes, keepdim=True) / count.clamp(min=1)
    centred = without_void(feature - mean, valid)
    variance = centred.square().sum(axes, keepdim=True) / (count - 1).clamp(min=1)
    # The square root has no gradient at 0.
    deviation = torch.where(variance > 0, variance, 1).sqrt()
    return centred / (deviation + eps)
