"""What a task is: how a batch becomes a supervised loss and a figure of merit."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import MetricCollection

from diffkd.batch import Batch
from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.names import load_class


class Task(ABC):
    """Base of every task. One file, one task; a recipe names it or says `my_tasks:MyTask`.

    Attributes:
        metric: the figure of merit, one of those that `metrics` computes; it picks the best epoch.
        metric_label: what tables call it.
        logits: taps of the model's output that are class scores, class axis first.

    Args:
        data: the data set the task runs on.
    """

    metric: ClassVar[str]
    metric_label: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    logits: ClassVar[tuple[str, ...]] = ("",)

    def __init__(self, data: Data) -> None:
        self.data = data

    def run(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output for a batch. Detectors, which want targets in training, override it."""
        return model(batch.images)

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Named supervised losses, each a scalar; empty where the batch carries no targets."""

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Fresh metrics over a whole data set. Their `compute` gives figures of 0 to 1."""

    @abstractmethod
    def update(self, metrics: MetricCollection, output: Any, batch: Batch) -> None:
        """Counts one batch in."""

    def answers(self, output: Any) -> Any:
        """What a model's output says the targets are, to measure agreement where there are no labels.

        Raises:
            UserError: the task cannot tell.
        """
        raise UserError(f"task '{type(self).__name__}' needs labelled test data")

    @property
    def chance(self) -> float | None:
        """What guessing would score on `metric`, where that is known."""
        return None

    def check_output(self, output: Any, model: str) -> None:  # noqa: B027
        """Raises UserError where a model's output cannot serve the task; `model` names the model."""


def task_class(name: str) -> type[Task]:
    """The class of a task by its name (`classification`) or place (`my_tasks:MyTask`).

    Raises:
        UserError: there is none of that name; the nearest names are given.
    """
    return load_class("diffkd.tasks", name, Task)  # type: ignore[type-abstract]
