"""Devices and processes: what a run is launched on, and what its first process does for all."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import nn

from diffkd.errors import UserError, first_line, own_frames, told
from diffkd.recipe.schema import Recipe
from diffkd.recipe.training import TrainerRecipe

T = TypeVar("T")

_NO_MEMORY = re.compile("can't allocate memory|not enough memory")
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def on_first(fabric: Fabric, work: Callable[[], T]) -> T:
    """What the first process does for all: they wait, and learn what came of it.

    Args:
        fabric: launched.
        work: done in the first process; gives a small plain value.

    Raises:
        UserError: the first process's, in every process.
    """
    found: T | None = None
    said: str | None = None
    if fabric.is_global_zero:
        try:
            found = work()
        except UserError as error:
            said = str(error)
        except OSError as error:
            said = f"{error.filename or 'output'}: {error.strerror or error}"
    found, said = fabric.broadcast((found, said))
    if said is not None:
        raise UserError(said)
    return found  # type: ignore[return-value]


def gathered(fabric: Fabric, value: Any) -> list[Any]:
    """The value of every process, in order."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def expect_unused(fabric: Fabric, names: Sequence[str]) -> str:
    """Has data-parallel training, before it is set up, expect weights without gradient; a line on them."""
    if isinstance(fabric.strategy, DDPStrategy):
        fabric.strategy._ddp_kwargs["find_unused_parameters"] = True
    shown = ", ".join(name.removeprefix("distiller.") for name in names[:3])
    return f"no gradient reaches {len(names)} weights, they stay as they are: {shown}"


def as_channels_last(*modules: nn.Module) -> None:
    """Brings the kernels of modules into the layout that reads channels together."""
    for module in modules:
        module.to(memory_format=torch.channels_last)


def fuses(fabric: Fabric, trainer: TrainerRecipe) -> bool:
    """Whether the optimizer may run as one kernel: it cannot where gradients are both scaled and clipped."""
    scaled_and_clipped = trainer.precision == "fp16" and trainer.clip_grad_norm is not None
    return fabric.device.type == "cuda" and not scaled_and_clipped


def is_alone() -> bool:
    """Whether this is the only process of a command."""
    return not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


def is_first() -> bool:
    """Whether this is the only process of a command, or the first of several: the one that reports."""
    return is_alone() or torch.distributed.get_rank() == 0


@contextmanager
def own_code(what: str) -> Iterator[None]:
    """Turns an error out of somebody's own model or method into one line that says where it is.

    Args:
        what: fails, as the line begins.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not own_frames(error) or _NO_MEMORY.search(str(error)):
            raise
        raise UserError(f"{what} fails: {told(error)}") from error


_TOO_LARGE = "a number is beyond what can be computed with; look for very large ones, as in optimizer"


@contextmanager
def in_one_line(recipe: Recipe) -> Iterator[None]:
    """Turns what a machine runs out of into one line that says what to lower."""
    less = f"lower data.batch_size ({recipe.data.batch_size}), or raise trainer.accumulate with it"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory on the accelerator; {less}, or try trainer.precision=bf16") from error
    except MemoryError as error:
        raise UserError(f"out of memory; {less}") from error
    except OverflowError as error:
        raise UserError(f"{_TOO_LARGE} ({first_line(error)})") from error
    except RuntimeError as error:
        line = first_line(error)
        if "without overflow" in line:
            raise UserError(f"{_TOO_LARGE} ({line})") from error
        if _NO_MEMORY.search(str(error)):
            raise UserError(f"out of memory; {less}") from error
        if line.startswith("DataLoader worker") and "killed" in line:
            raise UserError(
                f"a loader process was killed, as for want of memory; lower data.workers "
                f"({recipe.data.workers})"
            ) from error
        raise


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
    most = max(os.cpu_count() or 1, 8)
    on_cpu = wanted.accelerator == "cpu" or not any(available.values())
    if on_cpu and isinstance(wanted.devices, int) and wanted.devices > most:
        raise UserError(f"trainer.devices={wanted.devices}: more than the {most} processes that serve here")
    if on_cpu and wanted.precision == "fp16":  # Fabric would take bf16 in its place
        raise UserError("trainer.precision=fp16: processors do not train so; use bf16, or fp32")
    if count is not None and isinstance(wanted.devices, int) and wanted.devices > count:
        raise UserError(
            f"trainer.devices={wanted.devices}: there are {count} {wanted.accelerator} device(s) here"
        )
    try:
        fabric = Fabric(
            accelerator=wanted.accelerator,
            devices=wanted.devices,
            num_nodes=wanted.num_nodes,
            strategy=wanted.strategy,
            precision=PRECISIONS[wanted.precision],  # type: ignore[arg-type]
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"trainer: {first_line(error)}") from error
    _check_meeting(fabric, wanted.num_nodes)
    return fabric


def _check_meeting(fabric: Fabric, machines: int) -> None:
    """Refuses several machines of which none is told where the first one is: they would wait for ever."""
    place = getattr(fabric.strategy, "cluster_environment", None)
    lacking = [key for key in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if key not in os.environ]
    if machines > 1 and isinstance(place, LightningEnvironment) and lacking:
        raise UserError(
            f"trainer.num_nodes={machines}: set {', '.join(lacking)} on each machine (the first one's "
            "address, a free port of it, 0 to N-1), or start them with srun or torchrun"
        )


def launch(fabric: Fabric, say: Callable[[str], None]) -> None:
    """Starts this machine's processes and waits until all of the run have met.

    Args:
        fabric: not launched yet.
        say: is told whom it waits for, where that is not this machine alone.

    Raises:
        UserError: they cannot meet.
    """
    machines = getattr(fabric.strategy, "num_nodes", 1)
    where = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', 'a free port')}"
    if machines > 1 and os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"waiting at {where} for all {machines} machines (trainer.num_nodes)")
    try:
        fabric.launch()
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"the processes of this run cannot meet at {where}: {first_line(error)}") from error
