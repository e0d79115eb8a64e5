"""What changes as a run goes on: the share of a gradient that is let through."""

import math

import torch
from torch import Tensor, nn

_UNTOLD = 300  # forward passes of warm-up where nobody says how long the run is


class Gate(nn.Module):
    """Passes features on as they are, and of their gradient nothing at first, then all, or less and less.

    Progress is counted in forward passes in training mode; in evaluation mode everything passes.

    Args:
        warmup: share of the run in which no gradient passes.
        fade: whether what passes afterwards falls evenly to nothing at the run's end.

    >>> gate = Gate(warmup=0.5)
    >>> gate.expect(2)
    >>> x = torch.ones(2, requires_grad=True)
    >>> [torch.autograd.grad(gate(x).sum(), x)[0].tolist() for _ in range(2)]
    [[0.0, 0.0], [1.0, 1.0]]
    """

    seen: Tensor
    waits: Tensor
    fades: Tensor

    def __init__(self, warmup: float = 0.0, fade: bool = False) -> None:
        super().__init__()
        self.warmup, self.fade = warmup, fade
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("waits", torch.tensor(_UNTOLD if warmup else 0), persistent=False)
        self.register_buffer("fades", torch.tensor(math.inf), persistent=False)

    def expect(self, passes: int) -> None:
        """Says how many forward passes in training mode the run will have.

        Where nobody says, the warm-up is 300 passes long and nothing fades.
        """
        waits = round(passes * self.warmup)
        self.waits.fill_(waits)
        if self.fade:
            self.fades.fill_(max(1, passes - waits))

    def forward(self, feature: Tensor) -> Tensor:
        """The feature, of any shape."""
        if not self.training:
            return feature
        share = 1 - ((self.seen - self.waits) / self.fades).clamp(0, 1)
        share = torch.where(self.seen < self.waits, 0.0, share).to(feature.dtype)
        self.seen += 1
        return feature.detach() + share * (feature - feature.detach())
