"""What a task is: how models see a batch, what they learn from it, how good they are."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.data.base import Data, Split
from diffkd.errors import UserError
from diffkd.names import load_class

if TYPE_CHECKING:  # it takes seconds, and a look at a recipe needs none
    from torchmetrics import MetricCollection


def near_chance(score: float, chance: float, count: int) -> bool:
    """Whether a figure is no sign of anything learned.

    It is not, where it is within three standard errors of guessing, or not a tenth of the way from there to
    1; many classes are satisfied with twice of chance.

    Args:
        score: 0 to 1.
        chance: what guessing scores.
        count: samples that it was measured on.

    >>> near_chance(0.54, 0.5, 10_000), near_chance(0.6, 0.5, 10_000), near_chance(0.6, 0.5, 100)
    (True, False, True)
    >>> near_chance(0.015, 0.01, 10_000), near_chance(0.03, 0.01, 10_000)
    (True, False)
    """
    error = math.sqrt(chance * (1 - chance) / max(count, 1))
    return score < chance + max(3 * error, min(chance, (1 - chance) / 10))


@dataclass(frozen=True)
class Figures:
    """How good a model is on a data set.

    Attributes:
        scalars: single figures by name, such as top-1 or mIoU.
        arrays: figures of several numbers by name (per class, by size, a confusion matrix), as nested
            lists.
    """

    scalars: Mapping[str, float]
    arrays: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, computed: Mapping[str, Any]) -> "Figures":
        """Splits what a metric computed: single numbers, and tensors of several.

        >>> import torch
        >>> Figures.of({"miou": torch.tensor(0.5), "iou": torch.tensor([0.25, 0.75])})
        Figures(scalars={'miou': 0.5}, arrays={'iou': [0.25, 0.75]})
        """
        single = {k: v for k, v in computed.items() if not (isinstance(v, Tensor) and v.dim())}
        several = {k: _lists(v) for k, v in computed.items() if k not in single}
        return cls({k: float(v) for k, v in single.items()}, several)


def _lists(values: Any) -> Any:
    """Nested lists of a tensor, None where it says NaN: there is no such figure."""
    if isinstance(values, Tensor):
        return _lists(values.tolist())
    if isinstance(values, list):
        return [_lists(value) for value in values]
    return None if values != values else values


class Task(ABC):
    """Base of every task. One file, one task; a recipe names it or says `my_tasks:MyTask`.

    A simple task, whose models give one output in training and evaluation alike, says `loss`, `metrics`
    and `update`. Others play the roles apart: `prepare` makes a batch what a model sees, `train`, `teach`
    and `predict` run it.

    Attributes:
        metric: the figure of merit, one of those that `metrics` computes; it picks the best epoch.
        metric_label: what tables call it.
        logits: taps of the model's output that are class scores, class axis first.
        resizes: pictures may be resized to what a model wants.
        independent: class scores go through a sigmoid each and not through a softmax, for a picture may
            show several classes.
        weighs_classes: its loss weighs classes by `Data.class_weights`.
        mixes: pictures have one class each, so that two can be mixed.
        unlabelled: its losses leave out targets that are `diffkd.batch.UNLABELLED`.
        half: models may be evaluated in 16 bits where a run trains so: no answer is a coordinate, say.

    Args:
        data: the data set the task runs on.
    """

    metric: str
    metric_label: str
    higher_is_better: ClassVar[bool] = True
    logits: ClassVar[tuple[str, ...]] = ("",)
    resizes: ClassVar[bool] = True
    independent: bool = False
    weighs_classes: ClassVar[bool] = False
    mixes: ClassVar[bool] = True
    unlabelled: ClassVar[bool] = False
    half: ClassVar[bool] = False

    def __init__(self, data: Data) -> None:
        self.data = data

    def prepare(self, batch: Batch, preprocess: Callable[[Any], Any]) -> Batch:
        """The batch as one model sees it: picture and target, size and normalisation together.

        Args:
            batch: from the loader.
            preprocess: the model's own way with pictures `(B, C, H, W)` or a list of them.
        """
        return batch._replace(images=preprocess(batch.images))

    def frame(self, batch: Batch) -> Batch:
        """A loader's batch as both models see it before each one's own preparation, made once.

        Here pictures of different sizes are padded, say. What `validity` says is in it.
        """
        return batch._replace(valid=self.validity(batch))

    def validity(self, batch: Batch) -> Tensor | None:
        """Where a loader's batch has something to learn from, `(B, H, W)` bool; None for everywhere."""
        return batch.valid

    def sample(self, batch: Batch) -> Batch:
        """A loader's test batch at the size at which models are tried and their cost is measured."""
        return batch

    def taps(self, student: nn.Module, teacher: nn.Module) -> dict[str, str] | None:
        """Layers of the student and the teacher's that they learn from.

        What is left to be found is `LAST_MAP` or `SCORES` of `diffkd.features.defaults`; None has all found.
        """
        return None

    def run(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output for a prepared batch, where training and evaluation do not differ."""
        return model(batch.images)

    def train(self, student: nn.Module, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        """The student's output in training mode, and its supervised losses.

        Args:
            student: in training mode.
            batch: prepared for it.
        """
        output = self.run(student, batch)
        return output, self.loss(output, batch)

    def teach(self, teacher: nn.Module, batch: Batch) -> Any:
        """Runs the teacher as far as its taps go: nothing that turns features into answers is needed."""
        return self.run(teacher, batch)

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """A model's answers in evaluation mode, as `update` counts them."""
        return self.run(model, batch)

    def loss(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Named supervised losses of an output, each a scalar; empty where the batch carries no targets."""
        raise NotImplementedError(f"{type(self).__name__} says neither `loss` nor `train`")

    @abstractmethod
    def metrics(self) -> "MetricCollection":
        """Fresh metrics over a whole data set. Their `compute` gives figures of 0 to 1, by name.

        A tensor of several numbers (per class, say) is kept as an array of the run's figures.
        """

    @abstractmethod
    def update(self, metrics: "MetricCollection", output: Any, batch: Batch) -> None:
        """Counts one loader's batch and what `predict` gave for it in."""

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

    def check_data(self, first: Callable[[Split], Any]) -> None:  # noqa: B027
        """Raises UserError where the data's targets cannot serve the task.

        Args:
            first: gives the targets of the first samples of a split, None where there are none.
        """

    def check_seen(self) -> None:  # noqa: B027
        """Raises UserError where targets that `train` met could not be used.

        It may make the host wait, and is asked now and then.
        """

    def check_output(self, output: Any, model: str) -> None:  # noqa: B027
        """Raises UserError where a model's output cannot serve the task; `model` names the model."""


def task_class(name: str) -> type[Task]:
    """The class of a task by its name (`classification`) or place (`my_tasks:MyTask`).

    Raises:
        UserError: there is none of that name; the nearest names are given.
    """
    return load_class("diffkd.tasks", name, Task)  # type: ignore[type-abstract]
