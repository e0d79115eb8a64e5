"""What of a run is saved and comes back: values that mean the same on any number of processes."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffkd.runs.folder import RunFolder, load_checkpoint


def optimizer_state(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """The optimizer's state by parameter name.

    A parameter that never had a gradient has none, and is left out. Learning rates and the like are the
    recipe's.
    """
    named = ((name, optimizer.state.get(p)) for name, p in module.named_parameters())
    return {"state": {name: dict(state) for name, state in named if state}}


def load_optimizer_state(optimizer: Optimizer, module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Gives the optimizer what `optimizer_state` said, on its own devices."""
    names = {id(p): name for name, p in module.named_parameters()}
    current = optimizer.state_dict()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: saved["state"][names[id(p)]] for i, p in enumerate(held) if saved["state"].get(names[id(p)])}
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})


def keep_last(folder: RunFolder) -> None:
    """Leaves of a finished run's checkpoints the last one, without what only a run that goes on needs.

    Its weights stay, the methods' among them: they are what a look at the trained methods is made of.

    Raises:
        UserError: it could not be written.
    """
    found = folder.list_checkpoints()
    if not found:
        return
    for path in found[:-1]:
        path.unlink()
    state = load_checkpoint(found[-1])
    thin = {**state, "optimizer": None, "precision": None, "random": None}
    folder.save_checkpoint(state["place"]["step"], lambda path: torch.save(thin, path))


@torch.no_grad()
def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold nan or infinities; reads the device once.

    >>> not_finite([("a", torch.ones(2)), ("b", torch.tensor([1.0, float("nan")]))])
    ['b']
    """
    floating = [(name, value) for name, value in named if value.is_floating_point() and value.numel()]
    if not floating:
        return []
    device = floating[0][1].device
    good = torch.stack([value.isfinite().all().to(device) for _, value in floating])
    return [name for (name, _), fine in zip(floating, good.tolist(), strict=True) if not fine]


def lasting(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The weights and buffers that a checkpoint holds, by name."""
    return ((name, value) for name, value in module.state_dict().items() if isinstance(value, Tensor))


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The plain optimizer behind what Fabric makes of it."""
    plain: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return plain
