"""One model as a recipe names it: with its weights, and seeing pictures its own way."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.methods.base import method_class
from diffkd.models import base as models
from diffkd.models.freeze import freeze
from diffkd.models.origin import find_weights
from diffkd.models.weights import load_state
from diffkd.recipe.models import ModelRecipe, TeacherRecipe
from diffkd.recipe.schema import Recipe
from diffkd.tasks.base import Task


@dataclass
class Side:
    """One model with its way of seeing pictures: the student, or the teacher.

    Attributes:
        notes: what was decided for the user, one line each.
        weights: where its weights come from.
        input_shape: `(C, H, W)` of pictures that it was built for.
        fresh_head: its weights were made for other classes, so that its class scores mean nothing yet.
        frozen: layers that stay in evaluation mode while it trains.
    """

    name: str
    model: nn.Module
    prepare: models.Preprocess
    notes: list[str] = field(default_factory=list)
    weights: str | None = None
    fresh_head: bool = False
    frozen: tuple[nn.Module, ...] = ()
    input_shape: tuple[int, int, int] = (3, 0, 0)

    def to(self, device: torch.device) -> "Side":
        """Moves the model and its preparation to a device."""
        self.model.to(device)
        self.prepare.to(device)
        return self

    def forward(self, task: Task, batch: Batch) -> Any:
        """The model's answers for a loader's batch."""
        return task.predict(self.model, task.prepare(task.frame(batch), self.prepare))


def check_head(recipe: Recipe, task: Task, name: str, teacher: Side) -> None:
    """Refuses class scores of a teacher whose classifier was never trained.

    Raises:
        UserError: they are distilled.
    """
    if not teacher.fresh_head or recipe.every_teacher[name].train is not None:
        return
    taps = recipe.taps_of(name)
    tapped = bool(task.logits) if taps is None else "" in taps.values()
    logits = [name for name in recipe.method if tapped and method_class(name).uses_logits]
    key = name if name == "teacher" else f"teachers.{name}"
    if logits:
        raise UserError(
            f"teacher '{teacher.name}': its weights are for other classes, so its class scores, which method "
            f"'{logits[0]}' distils, mean nothing; add {key}.train.epochs=10, say, or tap features only"
        )


def build_side(wanted: ModelRecipe, data: Data, *, resizes: bool = True) -> Side:
    """A model with its weights, seeing pictures as the recipe, its weights or the data say, in this order.

    Args:
        wanted: the model.
        data: the data set that it is for.
        resizes: pictures may be resized to what the model wants; else they keep their size.
    """
    weights = find_weights(wanted.model, wanted.weights)
    wants = models.wants(wanted.model, weights.published)
    size = None
    if resizes:
        size = wanted.size or (weights.told.get("size") or [None])[0] or wants.size
    elif wanted.size is not None:
        raise UserError(
            f"{wanted.model}: size={wanted.size}, but this task keeps the pictures' size; set data.crop_size"
        )
    channels, height, width = data.image_shape
    shape = (wants.channels or channels, size or height, size or width)
    mean = wanted.mean or weights.told.get("mean") or wants.mean or data.mean
    std = wanted.std or weights.told.get("std") or wants.std or data.std
    for key, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, shape[0]):
            raise UserError(f"{wanted.model}: {key} has {len(values)} values for {shape[0]} channels")
    options = models.without_start(wanted.options) if weights.state else wanted.options
    model = models.build(wanted.model, num_classes=data.num_classes, image_shape=shape, options=options)
    if channels == 3 and models.takes_grey(model):
        shape = (1, *shape[1:])
        mean, std = (models.grey_value(v) if len(v) == 3 else v for v in (mean, std))
        weights.notes.append("it takes grey pictures: colours become grey")
    resized = None if size is None or (size, size) == (height, width) else (size, size)
    models.tell_normalisation(model, mean, std)
    prepare = models.Preprocess(mean, std, resized, channels=shape[0])
    side = Side(wanted.model, model, prepare, weights.notes, input_shape=shape)
    if resized is not None:
        side.notes.append(f"pictures of {height}x{width} resized to {size}x{size}")
    if weights.state:
        loaded = load_state(
            model,
            weights.state,
            weights.source,
            name=wanted.model,
            num_classes=data.num_classes,
            by_order=wanted.weights_by_order,
        )
        side.weights, side.fresh_head = weights.published or wanted.weights, loaded.fresh_head
        side.notes.append(loaded.note)
    section = "teacher" if isinstance(wanted, TeacherRecipe) else "student"
    side.frozen = freeze(model, wanted.freeze, wanted.freeze_norm, section)
    return side


def check_savable(student: Side) -> None:
    """Refuses a student whose weights could not be written at the end.

    Raises:
        UserError: its `state_dict` holds other things than plain tensors.
    """
    for key, value in student.model.state_dict().items():
        plain = isinstance(value, Tensor) and not value.is_quantized and value.layout == torch.strided
        if not plain or value.is_meta:
            raise UserError(
                f"student '{student.name}': '{key}' of its state_dict is no plain tensor, and cannot be "
                "saved; quantised, sparse and empty (meta) models cannot be trained"
            )
