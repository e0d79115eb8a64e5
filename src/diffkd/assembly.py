"""From a recipe to the things that it names: data, task, models, distiller."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.data.base import Data, Loader, Split, builder
from diffkd.distiller import Distiller
from diffkd.errors import UserError
from diffkd.measure import Cost, cost
from diffkd.models import base as models
from diffkd.recipe import ModelRecipe, Recipe, check_options
from diffkd.tasks.base import Task, task_class
from diffkd.weights import load_weights


@dataclass
class Side:
    """One model with its way of seeing pictures: the student, or the teacher."""

    name: str
    model: nn.Module
    prepare: models.Preprocess
    notes: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> "Side":
        """Moves the model and its preparation to a device."""
        self.model.to(device)
        self.prepare.to(device)
        return self

    def forward(self, task: Task, batch: Batch) -> Any:
        """The model's output for a batch."""
        return task.run(self.model, batch._replace(images=self.prepare(batch.images)))


@dataclass
class Parts:
    """What a recipe names, built."""

    recipe: Recipe
    data: Data
    task: Task
    student: Side
    teacher: Side | None

    def loader(self, split: Split, *, shuffle: bool, batch_size: int | None = None, **where: Any) -> Loader:
        """A loader of one of the data's splits, as the recipe says."""
        size = self.recipe.data.eval_batch_size or self.recipe.data.batch_size
        return Loader(
            split,
            batch_size or (self.recipe.data.batch_size if shuffle else size),
            shuffle=shuffle,
            seed=self.recipe.seed,
            workers=self.recipe.data.workers,
            collate=self.data.collate,
            **where,
        )

    def sample(self, size: int, device: torch.device | None = None) -> Batch:
        """The first test samples as one batch."""
        count = min(size, len(self.data.test))
        rows = self.loader(self.data.test, shuffle=False, batch_size=count, device=device)
        return next(iter(rows.epoch()))

    def distiller(self, sample: Batch) -> tuple[Distiller, list[str]]:
        """The distiller of the recipe's methods, and what it has to say of its taps."""
        methods = {name: {"weight": m.weight, **m.options} for name, m in self.recipe.method.items()}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            distiller = Distiller(
                self.student.model,
                self.teacher.model if self.teacher and methods else None,
                self.recipe.taps,
                methods,
                sample,
                run=self.task.run,
                logits=self.task.logits,
                student_input=self.student.prepare,
                teacher_input=self.teacher.prepare if self.teacher else None,
                num_classes=self.data.num_classes,
                dataset_size=len(self.data.train),
            )
        return distiller, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]

    def step(self, distiller: Distiller) -> "Step":
        """One training step as a module."""
        return Step(distiller, self.task, self.recipe.task.weight)

    def cost(self, side: Side) -> Cost:
        """What one model costs, measured on one test image."""
        device = next(side.model.parameters()).device
        images = side.prepare(self.sample(1, device).images)
        return cost(side.model, lambda: self.task.run(side.model, Batch(images)))


class Step(nn.Module):
    """One training step as one forward pass: distillation and supervised losses of a batch."""

    def __init__(self, distiller: Distiller, task: Task, task_weight: float) -> None:
        super().__init__()
        self.distiller, self.task, self.task_weight = distiller, task, task_weight

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named losses, weighted."""
        losses = self.distiller(batch)
        supervised = self.task.loss(losses.output, batch)
        return {f"task.{key}": value * self.task_weight for key, value in supervised.items()} | dict(losses)


def assemble(recipe: Recipe, *, with_teacher: bool = True) -> Parts:
    """Builds what the recipe names, on the CPU; nothing is written.

    Args:
        recipe: the run.
        with_teacher: False leaves the teacher out.

    Raises:
        UserError: anything that the recipe names does not exist or does not fit.
    """
    check_options(recipe)
    data = builder(recipe.data.name)(recipe.data.root, **recipe.data.options)
    task = task_class(recipe.task.name)(data, **recipe.task.options)
    student = build_side(recipe.student, data)
    teacher = None
    if with_teacher and recipe.teacher is not None:
        teacher = build_side(recipe.teacher, data)
    return Parts(recipe, data, task, student, teacher)


def build_side(wanted: ModelRecipe, data: Data) -> Side:
    """A model with its weights and its way of seeing pictures."""
    model = models.build(wanted.model, num_classes=data.num_classes, image_shape=data.image_shape)
    prepare = models.Preprocess(wanted.mean or data.mean, wanted.std or data.std, _size(wanted.size))
    side = Side(wanted.model, model, prepare)
    if wanted.weights is not None:
        side.notes.append(load_weights(model, wanted.weights, name=wanted.model))
    return side


def _size(size: int | None) -> tuple[int, int] | None:
    return None if size is None else (size, size)


@torch.no_grad()
def evaluate(side: Side, task: Task, loader: Loader) -> dict[str, float]:
    """The task's figures, 0 to 1, of a model over a whole split, in the precision of its weights."""
    training = side.model.training
    side.model.eval()
    metrics = task.metrics().to(loader.device)
    for batch in loader.epoch():
        task.update(metrics, side.forward(task, batch), batch)
    side.model.train(training)
    return {name: float(value) for name, value in metrics.compute().items()}


def describe_student(parts: Parts, figures: Mapping[str, Any]) -> dict[str, Any]:
    """What somebody needs to know to use the student's weights: `student/config.json`."""
    side, data = parts.student, parts.data
    return {
        "model": side.name,
        "task": parts.recipe.task.name,
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "image_shape": list(data.image_shape),
        "mean": side.prepare.mean.flatten().tolist(),
        "std": side.prepare.std.flatten().tolist(),
        "size": side.prepare.size,
        "figures": dict(figures),
    }


def check_outputs(parts: Parts, sample: Batch) -> None:
    """Runs both models once.

    Raises:
        UserError: an output does not fit the task.
    """
    sides = {"student": parts.student} | ({"teacher": parts.teacher} if parts.teacher else {})
    for what, side in sides.items():
        training = side.model.training
        side.model.eval()
        try:
            with torch.no_grad():
                output = side.forward(parts.task, sample)
        except UserError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            size = tuple(sample.images[0].shape)
            first = str(error).splitlines()[0]
            raise UserError(f"{what} '{side.name}' cannot take pictures of {size}: {first}") from error
        finally:
            side.model.train(training)
        parts.task.check_output(output, f"{what} '{side.name}'")
