"""Dry runs: a forward pass that leaves no trace, and what it shows of a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def dry_run(model: nn.Module) -> Iterator[None]:
    """Eval mode for a forward pass that leaves no trace: no statistics, no random numbers, no mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalizes by each batch's statistics, and its running ones stay as they are."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, (training, tracks) in zip(layers, before, strict=True):
            layer.training, layer.track_running_stats = training, tracks


@contextmanager
def all_learning(model: nn.Module) -> Iterator[None]:
    """Every weight gets a gradient, so that an output's graph tells which layers made it."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@dataclass
class Watched:
    """What a dry run shows.

    Attributes:
        leaves: layers with weights of their own, in order of execution, by every path that they are
            inside of.
        seen: spatial axes of the pictures as the first layer with weights saw them: resized and padded,
            where the model does that itself; None before it ran, and where it was given no picture.
        batch: number of samples that it was given, None where unknown.
    """

    leaves: dict[str, list[nn.Module]] = field(default_factory=dict)
    seen: tuple[int, ...] | None = None
    batch: int | None = None
    paths: list[str] = field(default_factory=list)  # of the leaves, in order of execution

    _latest: list[nn.Module] = field(default_factory=list)
    _channels: int | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Follows the pictures on their way to the first layer with weights.

        A model may resize them, and may fold pixels into channels before that layer, which is no resizing.
        """
        if self._latest:
            return
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() >= 3]
        given = [x for x in tensors if x.dim() >= 4]
        if tensors:
            self.batch = tensors[0].shape[0]
        if given and self._channels in (None, given[0].shape[1]):
            self._channels = given[0].shape[1]
            self.seen = tuple(given[0].shape[2:])

    def leave(self, path: str) -> Callable[..., None]:
        """A hook for a layer with weights of its own."""
        parts = path.split(".") if path else []
        above = ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not self._latest or not any(True for child in module.children() for _ in child.parameters()):
                self._latest[:] = [module]  # of a block with weights of its own its last layer knows more
            self.paths.append(path)
            for outer in dict.fromkeys(above):
                self.leaves.setdefault(outer, []).append(module)

        return hook

    def borrow(self, path: str) -> Callable[..., None]:
        """A hook for an activation or a permutation: of its axes what ran before it knows."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.leaves[path] = list(self._latest)

        return hook


@contextmanager
def watching(model: nn.Module) -> Iterator[Watched]:
    """Watches all layers of a model that runs meanwhile."""
    watched = Watched()
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks
        handles.append(module.register_forward_pre_hook(watched.enter, with_kwargs=True))
        if any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(watched.leave(path)))
        elif not any(True for _ in module.parameters()):
            handles.append(module.register_forward_hook(watched.borrow(path)))
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()
