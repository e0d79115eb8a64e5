"""Devices and processes: what a run is launched on, and what its first process does for all."""

import logging
from collections.abc import Callable

import torch
from lightning.fabric import Fabric

from diffkd.errors import UserError
from diffkd.recipe.schema import Recipe

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def on_first(fabric: Fabric, check: Callable[[], None]) -> None:
    """Runs a check in the first process; its error is every process's."""
    said = None
    if fabric.is_global_zero:
        try:
            check()
        except UserError as error:
            said = str(error)
    said = fabric.broadcast(said)
    if said is not None:
        raise UserError(said)


def make_fabric(recipe: Recipe) -> Fabric:
    """Devices, precision and strategy as the recipe says.

    Raises:
        UserError: a device is not there.
    """
    # Fabric tells of every precision and process that it was asked for.
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    wanted = recipe.trainer
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = available.get(wanted.accelerator)
    if count == 0:
        raise UserError(f"trainer.accelerator={wanted.accelerator}: no such device here; use auto or cpu")
    if count is not None and isinstance(wanted.devices, int) and wanted.devices > count:
        raise UserError(
            f"trainer.devices={wanted.devices}: there are {count} {wanted.accelerator} device(s) here"
        )
    try:
        return Fabric(
            accelerator=wanted.accelerator,
            devices=wanted.devices,
            num_nodes=wanted.num_nodes,
            strategy=wanted.strategy,
            precision=PRECISIONS[wanted.precision],  # type: ignore[arg-type]
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from error
