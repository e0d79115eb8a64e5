"""Mimic: Mimicking Very Efficient Network for Object Detection (Li, Jin and Yan, CVPR 2017)."""

from diffkd.methods.base import Regression


class Mimic(Regression):
    """The teacher's maps of every level, imitated through a 1x1 convolution each.

    Li, Jin and Yan, CVPR 2017 (not on arXiv). With r the convolution of a level, and the mean over
    samples, channels and valid positions, the loss of each level is

        kd = mean((r(student) - teacher)^2).

    For detectors of any kind, on the levels of their pyramid; it serves other tasks too, on one map of
    each resolution. The paper samples the regions of proposals; here, as is usual since one-stage
    detectors, every position counts. Its weight is 1.

    Use it as the plain baseline on the levels of a detector's pyramid.

    Args:
        setup: what the run taps.

    Raises:
        UserError: no feature is tapped, or the two of a pair are of different kinds.

    >>> import torch
    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "mimic", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['mimic.0.kd']
    """

    stages = "all"
