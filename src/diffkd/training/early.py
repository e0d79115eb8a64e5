"""Which epoch is the best, what ends a run before its length, and what is told after each epoch."""

from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from diffkd.batch import Batch
from diffkd.pictures.loading import Loader
from diffkd.recipe.training import TrainerRecipe
from diffkd.runs.bar import ProgressBar
from diffkd.runs.folder import History
from diffkd.tasks.base import Task
from diffkd.training.evaluation import Look
from diffkd.training.interrupt import StopRequest
from diffkd.training.length import Length
from diffkd.training.meter import Place


@dataclass(frozen=True)
class Choice:
    """How the best epoch is chosen.

    Attributes:
        key: of a row of history.
        sign: 1 where more is better, else -1.
        on: "val" or "test": the data that choose.
    """

    key: str
    sign: int
    on: str

    def best(self, history: History) -> dict[str, float] | None:
        """The first row with the best figure.

        >>> Choice("top1", 1, "test").best([{"top1": 0.5}, {"top1": 0.7}, {"top1": 0.7, "epoch": 3}])
        {'top1': 0.7}
        """
        return max(history, key=lambda row: self.sign * row[self.key], default=None)

    def since_best(self, history: History) -> int:
        """Evaluations since the best one.

        >>> Choice("loss", -1, "val").since_best([{"loss": 0.5}, {"loss": 0.4}, {"loss": 0.6}])
        1
        """
        best = self.best(history)
        return 0 if best is None else len(history) - 1 - history.index(best)

    def told(self, history: History, length: Length, task: Task) -> str:
        """The newest row of history in few words."""
        row = history[-1]
        figure = f"{task.metric_label} {100 * row[task.metric]:.2f} %"
        if self.on == "val":
            figure += f" (validation {100 * row[self.key]:.2f} %)"
        mark = ", the best so far" if self.best(history) is row else ""
        where = length.told(int(row["step"]))
        return f"{where}: {figure}{mark}, loss {row['loss']:.3f}, {row['images_per_second']:,.0f} img/s"


def is_late(recipe: TrainerRecipe, place: Place, length: Length, fabric: Fabric) -> bool:
    """Whether a run's time is over. Several processes agree at the steps at which they look anyway.

    Args:
        recipe: `max_minutes`.
        place: where it is.
        length: of the run.
        fabric: launched.
    """
    if recipe.max_minutes is None or place.step == length.last:
        return False
    if fabric.world_size == 1:
        return place.elapsed >= 60 * recipe.max_minutes
    if place.step % recipe.log_every:
        return False
    longest = fabric.all_reduce(torch.tensor(place.elapsed, device=fabric.device), reduce_op="max")
    assert isinstance(longest, Tensor)
    return float(longest) >= 60 * recipe.max_minutes


def is_asked(stop: StopRequest, recipe: TrainerRecipe, place: Place, fabric: Fabric) -> bool:
    """Whether the run was asked to stop. Several processes agree as on their time.

    Args:
        stop: learns the signal that came to any of them.
        recipe: `log_every`.
        place: where it is.
        fabric: launched.
    """
    if fabric.world_size == 1:
        return stop.signal is not None
    if place.step % recipe.log_every:
        return False
    signal = fabric.all_reduce(torch.tensor(float(stop.signal or 0), device=fabric.device), reduce_op="max")
    assert isinstance(signal, Tensor)
    stop.signal = int(signal) or None
    return stop.signal is not None


def watching(bar: ProgressBar, loader: Loader, what: str = "", also: Look | None = None) -> Look:
    """What tells a bar of an evaluation, batch by batch.

    Args:
        bar: of the evaluation, or of something else beside which it is told.
        loader: of the evaluation.
        what: it is, in the latter case.
        also: looks on, too.
    """
    batches = count(1)

    def show(batch: Batch, answers: Any) -> None:
        if also is not None:
            also(batch, answers)
        if what:
            number = next(batches)
            bar.aside(f"{what} {number}/{len(loader)}" if number < len(loader) else "")
        else:
            bar.step(1, len(batch.images) * loader.world_size)
            bar.show("", {})

    return show


def ended(recipe: TrainerRecipe, choice: Choice, place: Place, late: bool) -> str:
    """Why a run ends after its newest evaluation; empty where it goes on.

    Args:
        recipe: `patience` and `max_minutes`.
        choice: of the best epoch.
        place: with the newest row.
        late: its time is over.
    """
    if late:
        return f"trainer.max_minutes={recipe.max_minutes:g} are over"
    if recipe.patience is not None and choice.since_best(place.history) >= recipe.patience:
        what = "validation" if choice.on == "val" else "test"
        return f"no better on the {what} data for {recipe.patience} evaluations (trainer.patience)"
    return ""
