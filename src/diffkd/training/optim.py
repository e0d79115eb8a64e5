"""Optimizers, and the learning rate as a function of the place in the run."""

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from diffkd.recipe.training import OptimizerRecipe, ScheduleRecipe
from diffkd.training.length import Length


def build_optimizer(recipe: OptimizerRecipe, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer of a recipe over all parameters that want gradients."""
    wanted = [p for p in parameters if p.requires_grad]
    if recipe.name == "adamw":
        return AdamW(
            wanted, recipe.lr, betas=(recipe.betas[0], recipe.betas[1]), weight_decay=recipe.weight_decay
        )
    if recipe.name == "rmsproptf":
        from timm.optim.rmsprop_tf import RMSpropTF

        return RMSpropTF(wanted, recipe.lr, recipe.alpha, recipe.eps, recipe.weight_decay, recipe.momentum)
    return SGD(
        wanted,
        recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )


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
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
