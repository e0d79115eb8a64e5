"""FitNets: Hints for Thin Deep Nets (Romero et al., ICLR 2015, arXiv 1412.6550)."""

from diffkd.methods.base import Regression


class FitNet(Regression):
    """Mean squared error of the teacher's feature and what a 1x1 convolution makes of the student's.

    Romero et al., ICLR 2015, arXiv 1412.6550. With r the convolution (a linear layer for vectors), and
    the mean over samples, channels and positions, the loss is

        kd = mean((r(student) - teacher)^2).

    The paper trains the hint in a stage of its own; here, as is usual since, it is one of the losses of
    the whole training. Its weight for CIFAR-100 is 100. Serves every task and kind of feature.

    Use it as the plain baseline of methods on features: what does not beat it is not worth its
    cost.

    Args:
        setup: what the run taps.

    Raises:
        UserError: no feature is tapped, or the two of a pair are of different kinds.

    >>> import torch
    >>> from torch import nn
    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "fitnet", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller(torch.rand(2, 3, 8, 8)))
    ['fitnet.0.kd']
    """

    weight = 100.0
