"""Optimizers, and the learning rate as a function of the place in the run."""

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from diffkd.recipe.schema import OptimizerRecipe, ScheduleRecipe


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


def lr_factor(schedule: ScheduleRecipe, epoch: float, epochs: int) -> float:
    """What the base learning rate is multiplied by.

    Args:
        schedule: the recipe's schedule.
        epoch: the place in the run, in epochs, with a fraction within an epoch.
        epochs: length of the whole run.

    >>> from diffkd.recipe.schema import StepSchedule
    >>> step = StepSchedule(milestones=[2, 3], factor=0.1, warmup_epochs=1)
    >>> [round(lr_factor(step, e, 4), 3) for e in (0.5, 1.9, 2.0, 3.5)]
    [0.5, 1.0, 0.1, 0.01]
    """
    if epoch < schedule.warmup_epochs:
        return epoch / schedule.warmup_epochs
    # Milestones count from the start of the run, smooth curves from the end of the warm-up.
    part = (epoch - schedule.warmup_epochs) / max(epochs - schedule.warmup_epochs, 1e-9)
    part = min(part, 1.0)
    if schedule.name == "step":
        passed = epoch // schedule.every if schedule.every else sum(epoch >= m for m in schedule.milestones)
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
