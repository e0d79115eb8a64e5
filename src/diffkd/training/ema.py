"""The averaged student."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """An exponential moving average of a model's weights and buffers.

    The decay warms up: `min(decay, (1 + n) / (10 + n))` after `n` updates, so that a short run does not
    ship its start. Nothing is read back from the device.

    Args:
        model: the model to follow; the average starts as a copy of it.
        decay: share of the old average that stays at each update, once warm.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> ema = Ema(model, 0.999)
    >>> _ = nn.init.ones_(model.weight)
    >>> ema.update(model, 1)  # 2/11 of the old one stays
    >>> round(ema.model.weight.item(), 4)
    0.8182
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Moves the average towards the model; `updates` counts them, this one included."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averaged, current = list(_state(self.model)), list(_state(model))
        floating = [i for i, value in enumerate(averaged) if value.is_floating_point()]
        torch._foreach_lerp_([averaged[i] for i in floating], [current[i] for i in floating], 1 - decay)
        for ours, theirs in zip(averaged, current, strict=True):
            if not ours.is_floating_point():
                ours.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and buffers."""
        return dict(self.model.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, also one that counts its updates itself, as they once were saved."""
        if "n_averaged" in state:
            state = {k.removeprefix("module."): v for k, v in state.items() if k != "n_averaged"}
        self.model.load_state_dict(state)


def _state(model: nn.Module) -> "list[Tensor]":
    return [p.detach() for p in model.parameters()] + list(model.buffers())
