"""Optimizers, and the learning rate as a function of the place in the run."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from diffkd.errors import UserError, nearest
from diffkd.recipe.training import OptimizerRecipe, ScheduleRecipe
from diffkd.training.length import Length

_POSITIONS = re.compile(r"relative_position|rel_pos|position_bias|pos_embed|position_embedding")


def build_optimizer(recipe: OptimizerRecipe, step: nn.Module, *, fused: bool = False) -> Optimizer:
    """The optimizer of a recipe over all of a step's weights that want gradients, in groups.

    Args:
        recipe: of the optimizer.
        step: one training step; the student's weights are under `distiller.student`.
        fused: one kernel for all weights, where the optimizer has one.

    Raises:
        UserError: the recipe names a layer that is not there, or nothing is left to train.
    """
    groups = parameter_groups(recipe, step)
    if recipe.name == "adamw":
        betas = (recipe.betas[0], recipe.betas[1])
        return AdamW(groups, recipe.lr, betas=betas, weight_decay=recipe.weight_decay, fused=fused or None)
    if recipe.name == "rmsproptf":
        from timm.optim.rmsprop_tf import RMSpropTF

        return RMSpropTF(groups, recipe.lr, recipe.alpha, recipe.eps, recipe.weight_decay, recipe.momentum)
    return SGD(
        groups,
        recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=fused or None,
    )


def parameter_groups(recipe: OptimizerRecipe, step: nn.Module) -> list[dict[str, Any]]:
    """The weights that want gradients, grouped by learning-rate factor and decay.

    Raises:
        UserError: the recipe names a layer that is not there, or nothing is left to train.
    """
    named = {_told(name): p for name, p in step.named_parameters()}
    modules = {_told(name): module for name, module in step.named_modules()}
    paths = [] if isinstance(recipe.no_decay, str) else [path for path in recipe.no_decay if path != "auto"]
    for key, wanted in (("no_decay", paths), ("lr_factors", list(recipe.lr_factors))):
        for path in wanted:
            if path not in modules and path not in named:
                known = [name for name in [*modules, *named] if name]
                raise UserError(f"optimizer.{key}: no layer '{path}'{nearest(path, known)}")
    spared = _undecayed(named, modules) if recipe.no_decay == "auto" or "auto" in recipe.no_decay else set()
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in named.items():
        if not parameter.requires_grad:
            continue
        decays = not (recipe.weight_decay and (name in spared or any(_within(name, p) for p in paths)))
        inside = [path for path in recipe.lr_factors if _within(name, path)]
        factor = recipe.lr_factors[max(inside, key=len)] if inside else 1.0
        group = groups.setdefault((factor, decays), {"params": [], "factor": factor})
        group["params"].append(parameter)
        if not decays:
            group["weight_decay"] = 0.0
    if not groups:
        raise UserError("student.freeze: nothing is left to train")
    return list(groups.values())


def _told(name: str) -> str:
    """A weight's path as the recipe says it."""
    for inner, outer in (("distiller.student", ""), ("distiller.methods", "method")):
        if _within(name, inner):
            return (outer + name.removeprefix(inner)).removeprefix(".")
    return name


def _within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _undecayed(named: Mapping[str, nn.Parameter], modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of the weights that are usually not decayed."""
    found = {name for name, p in named.items() if p.dim() <= 1 or name.endswith("bias")}
    found |= {name for name in named if _POSITIONS.search(name)}
    for path, module in modules.items():
        before = f"{path}." if path else ""
        if "Norm" in type(module).__name__:
            found |= {before + name for name, _ in module.named_parameters(recurse=False)}
        if callable(getattr(module, "no_weight_decay", None)):
            told = tuple(before + name for name in module.no_weight_decay())  # type: ignore[operator]
            found |= {name for name in named if name in told}
    return found


def lr_factor(schedule: ScheduleRecipe, step: int, length: Length) -> float:
    """What the base learning rate is multiplied by after `step` optimizer steps of a run.

    >>> from diffkd.recipe.training import StepSchedule, TrainerRecipe
    >>> length = Length.of(TrainerRecipe(epochs=4), per_epoch=10)
    >>> step = StepSchedule(milestones=[2, 3], factor=0.1, warmup_epochs=1)
    >>> [round(lr_factor(step, s, length), 3) for s in (5, 19, 20, 35)]
    [0.5, 1.0, 0.1, 0.01]
    """
    epoch, epochs = length.epochs(step), length.epochs(length.total)
    warmup = schedule.warmup_epochs
    if schedule.warmup_steps is not None:
        warmup = length.epochs(schedule.warmup_steps)
    if epoch < warmup:
        return epoch / warmup
    # Milestones count from the start of the run, smooth curves from the end of the warm-up.
    part = min((epoch - warmup) / max(epochs - warmup, 1e-9), 1.0)
    if schedule.name == "step":
        at = {"epochs": epoch, "steps": step, "share": length.progress(step)}[schedule.unit]
        passed = at // schedule.every if schedule.every else sum(at >= m for m in schedule.milestones)
        return float(schedule.factor**passed)
    if schedule.name == "cosine":
        return schedule.final_factor + (1 - schedule.final_factor) * 0.5 * (1 + math.cos(math.pi * part))
    if schedule.name == "poly":
        return float((1 - part) ** schedule.power)
    return 1.0


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of every group, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
