"""From a recipe to the things that it names: data, task, models, distiller."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.data.base import Data, Loader, Split, Streamed
from diffkd.distiller import Distiller
from diffkd.errors import UserError, first_line, told
from diffkd.features.outputs import are_probabilities
from diffkd.methods.base import method_class
from diffkd.models import base as models
from diffkd.models.measure import Cost, cost, device_of
from diffkd.pictures.memory import mix_batch
from diffkd.pictures.unlabelled import joined
from diffkd.recipe.classes import build_data
from diffkd.recipe.schema import Recipe, check_options
from diffkd.recipe.sides import Side as Side
from diffkd.recipe.sides import build_side as build_side
from diffkd.recipe.sides import check_head, check_savable
from diffkd.runs.content import digests
from diffkd.runs.identity import Identity, identify
from diffkd.tasks.base import Task, task_class

_FIRST = 16  # samples whose targets are looked at before any work
_BEYOND = re.compile(r"overflow|can't allocate memory|not enough memory|invalid size", re.IGNORECASE)
_SLACK = 0.01  # by which pictures of 0 to 1 may leave that range


@dataclass
class Parts:
    """What a recipe names, built.

    Attributes:
        teachers: by name; the first, or the only one, is called `teacher`.
        say: is told what samples warn of; None makes Python's own warnings of it.
    """

    recipe: Recipe
    data: Data
    task: Task
    student: Side
    teachers: Mapping[str, Side]
    say: Callable[[str], None] | None = None

    @property
    def teacher(self) -> Side | None:
        """The teacher; of several the first."""
        return self.teachers.get("teacher")

    @cached_property
    def training(self) -> Split:
        """The samples to train on, those without labels last."""
        data = self.data
        return data.train if data.unlabelled is None else joined(data.train, data.unlabelled)

    def loader(self, split: Split, *, shuffle: bool, batch_size: int | None = None, **where: Any) -> Loader:
        """A loader of one of the data's splits, as the recipe says."""
        size = self.recipe.data.eval_batch_size or self.recipe.data.batch_size
        return Loader(
            split,
            batch_size or (self.recipe.data.batch_size if shuffle else size),
            shuffle=shuffle,
            seed=self.recipe.seed,
            collate=self.data.collate,
            finish=self._mix() if shuffle else None,
            labelled=len(self.data.train) if self.data.unlabelled is not None and shuffle else None,
            say=self.say,
            **{"workers": self.recipe.data.workers, **where},
        )

    def _mix(self) -> Callable[[Batch, torch.Generator], Batch] | None:
        """Mixup and cutmix of training batches, where the recipe asks for them."""
        wanted, classes = self.recipe.data, self.data.num_classes
        if not (wanted.mixup or wanted.cutmix):
            return None
        if classes is None or not self.task.mixes:
            raise UserError(
                "data.mixup and data.cutmix need pictures that have one class each; leave them out"
            )
        if self.data.unlabelled is not None:
            raise UserError(
                "data.mixup and data.cutmix cannot mix pictures with a label and without; leave them out, or "
                "data.unlabelled"
            )
        return lambda batch, generator: mix_batch(batch, classes, wanted.mixup, wanted.cutmix, generator)

    def sample(self, size: int, device: torch.device | None = None) -> Batch:
        """The first test samples as one batch.

        Raises:
            UserError: there is none.
        """
        count = min(size, len(self.data.test)) or 1
        rows = self.loader(self.data.test, shuffle=False, batch_size=count, device=device, workers=0)
        batch = next(iter(rows.epoch()), None)
        if batch is None:
            raise UserError("there is not one test sample; give some, or a share of the training samples")
        return self.task.sample(batch)

    def first_targets(self, split: Split) -> Any:
        """The targets of a split's first samples; None where they carry none."""
        count = min(_FIRST, len(split))
        rows = self.loader(split, shuffle=False, batch_size=count, workers=0)
        return next((batch.targets for batch in rows.epoch()), None)

    def notes(self) -> Iterator[str]:
        """What data and models decided for the user, in lines."""
        yield f"data: {self.data.summary}"
        yield from self.data.notes
        if self.data.unlabelled is not None:
            share = len(self.data.train) / len(self.training) * self.recipe.data.batch_size
            yield f"a batch of {self.recipe.data.batch_size} holds {share:.3g} labelled pictures in the mean"
        meant, recipe = self.recipe.optimizer.lr_batch, self.recipe
        if meant is not None:
            yield (
                f"learning rate {recipe.learning_rate:g} for {recipe.step_size} pictures a step "
                f"({recipe.optimizer.lr:g} for {meant})"
            )
        for what, side in {"student": self.student, **self.teachers}.items():
            yield from (f"{what}: {note}" for note in side.notes)

    def account(self, distiller: Distiller) -> Iterator[str]:
        """The notes, and what is tapped."""
        yield from self.notes()
        for name, pairs in distiller.pairs_by_teacher.items():
            for pair in pairs:
                yield (
                    f"tap: student {pair.student.layer or 'output'} {pair.student.shape} "
                    f"<- {name} {pair.teacher.layer or 'output'} {pair.teacher.shape}"
                )

    @cached_property
    def content(self) -> dict[str, str]:
        """Digests of the data. To be asked for before a sample is taken."""
        return digests(self.data, self.recipe.data.root)

    @property
    def identity(self) -> Identity:
        """All that determines the run's result."""
        return identify(self.recipe, self.content)

    @cached_property
    def teacher_answers(self) -> bool:
        """Whether the teacher gives what the task asks for; a backbone gives features alone.

        Raises:
            UserError: it does not, and is asked for more.
        """
        if self.teacher is None:
            return False
        output = _answers("teacher", self.teacher, self.task, self.sample(2))
        try:
            self.task.check_output(output, f"teacher '{self.teacher.name}'")
        except UserError:
            if self._asks_for_answers() or models.from_classifier(output, self.teacher.model):
                raise
            if len(self.teachers) > 1:
                raise
            self.teacher.notes.append("it gives no class scores: its features alone teach")
            return False
        _look_at_scores(self.teacher, self.task, output)
        for name, side in self.teachers.items():
            if side is not self.teacher:
                output = _answers(name, side, self.task, self.sample(2))
                self.task.check_output(output, f"teacher '{side.name}'")
                _look_at_scores(side, self.task, output)
        return True

    def _asks_for_answers(self) -> bool:
        """Whether anything needs more of the teacher than its features."""
        recipe, classes = self.recipe, [method_class(name) for name in self.recipe.method]
        if recipe.teacher is None or recipe.teacher.train is not None or self.sample(1).targets is None:
            return True
        taps = recipe.taps_of()
        if taps is not None:
            return any(not layer.partition("[")[0] for layer in taps.values())
        return any(kind.uses_logits and kind.stages == "none" for kind in classes)

    def distiller(self, sample: Batch) -> tuple[Distiller, list[str]]:
        """The distiller of the recipe's methods, and what it has to say of its taps."""
        methods = {name: m.choice for name, m in self.recipe.method.items()}
        taught = {name: side.model for name, side in self.teachers.items() if methods}
        prepare = self.student.prepare
        seen = {name: prepare.instead_of(side.prepare) for name, side in self.teachers.items()}
        shares = {name: teacher.share for name, teacher in self.recipe.every_teacher.items()}
        scores = self.task.logits
        if scores and methods and not self.teacher_answers:
            scores = ()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            distiller = self._built(
                self.student.model,
                taught if len(taught) > 1 else taught.get("teacher"),
                self.recipe.taps if len(taught) > 1 else self.recipe.taps_of(),
                methods,
                sample,
                task=self.task,
                logits=scores,
                student_input=self.student.prepare,
                teacher_input=seen if len(taught) > 1 else seen.get("teacher"),
                teacher_weights=shares if len(taught) > 1 else None,
                num_classes=self.data.num_classes,
                dataset_size=None if isinstance(self.training, Streamed) else len(self.training),
            )
        distiller.at(0.5)  # for trials, in the middle of schedules: what pulls later pulls then, too
        return distiller, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]

    def _built(self, *args: Any, **options: Any) -> Distiller:
        """A distiller; an option beyond what can be computed with is told in one line."""
        try:
            return Distiller(*args, **options)
        except (OverflowError, MemoryError, RuntimeError, ValueError) as error:
            beyond = isinstance(error, OverflowError | MemoryError) or _BEYOND.search(str(error))
            if not beyond:
                raise
            raise UserError(
                f"method {', '.join(self.recipe.method)}: a number of its options is too large "
                f"({first_line(error)})"
            ) from error

    def step(self, distiller: Distiller) -> "Step":
        """One training step as a module."""
        return Step(distiller, self.recipe.task_weight, self.student.frozen)

    def cost(self, side: Side) -> Cost:
        """What one model costs, measured on one test image."""
        device = device_of(side.model)
        prepared = self.task.prepare(self.task.frame(self.sample(1, device)), side.prepare)
        try:
            return cost(side.model, lambda: self.task.predict(side.model, prepared))
        except (RuntimeError, ValueError, AssertionError, TypeError, LookupError) as error:
            raise UserError(
                f"model '{side.name}' cannot take 1 picture alone: {first_line(error)}"
            ) from error


class Step(nn.Module):
    """One training step as one forward pass: distillation and supervised losses of a batch.

    Args:
        distiller: of student, teacher and methods.
        task_weight: of the supervised losses.
        frozen: the student's layers that stay in evaluation mode in `train()` too.
    """

    def __init__(self, distiller: Distiller, task_weight: float, frozen: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.distiller, self.task_weight = distiller, task_weight
        self._frozen = tuple(frozen)

    def train(self, mode: bool = True) -> "Step":
        """Sets training mode, but for what is frozen."""
        super().train(mode)
        for module in self._frozen:
            module.train(False)
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named losses, weighted."""
        losses = self.distiller(batch)
        supervised = {f"task.{key}": value * self.task_weight for key, value in losses.supervised.items()}
        return supervised | dict(losses)


def assemble(recipe: Recipe, *, with_teacher: bool = True, student: Side | None = None) -> Parts:
    """Builds what the recipe names, on the CPU; nothing is written.

    Args:
        recipe: the run.
        with_teacher: False leaves the teacher out.
        student: a student that is there already.

    Raises:
        UserError: anything that the recipe names does not exist or does not fit.
    """
    check_options(recipe)
    wanted_task = task_class(recipe.task.name)
    if recipe.data.unlabelled is not None and recipe.method:
        _check_unlabelled(recipe, wanted_task)
    recipe, data = build_data(recipe, unlabelled=with_teacher and bool(recipe.method))
    task = wanted_task(data, **recipe.task.options)
    if data.class_weights and not task.weighs_classes:
        raise UserError(f"data.class_weights: task '{recipe.task.name}' weighs no classes")
    data = _with_unlabelled(recipe, data, task)
    student = student or build_side(recipe.student, data, resizes=task.resizes)
    teachers = {}
    for name, wanted in recipe.every_teacher.items() if with_teacher else ():
        teachers[name] = build_side(wanted, data, resizes=task.resizes)
        check_head(recipe, task, name, teachers[name])
    return Parts(recipe, data, task, student, teachers)


def _with_unlabelled(recipe: Recipe, data: Data, task: Task) -> Data:
    """The data without unlabelled pictures where nothing learns from them."""
    if not recipe.method and (data.unlabelled is not None or recipe.data.unlabelled is not None):
        note = "data.unlabelled serves nothing without a method: left out"
        return replace(data, unlabelled=None, notes=(*data.notes, note))
    if data.unlabelled is not None:
        _check_unlabelled(recipe, type(task))
    return data


def _check_unlabelled(recipe: Recipe, task: type[Task]) -> None:
    """Raises UserError where a task cannot learn from pictures without labels."""
    if not task.unlabelled:
        raise UserError(
            f"data.unlabelled: task '{recipe.task.name}' needs a target for every picture; leave it out"
        )


def check_outputs(parts: Parts, sample: Batch) -> None:
    """Runs both models once, and looks at the first targets.

    Raises:
        UserError: an output or the targets do not fit the task.
    """
    parts.task.check_data(parts.first_targets)
    _check_pictures(parts, sample)
    student = parts.student
    output = _answers("student", student, parts.task, sample)
    parts.task.check_output(output, f"student '{student.name}'")
    check_savable(student)
    _look_at_scores(student, parts.task, output)
    _ = parts.teacher_answers


def _look_at_scores(side: Side, task: Task, scores: Any) -> None:
    """A note where class scores are probabilities.

    Raises:
        UserError: they are not finite.
    """
    if not isinstance(scores, Tensor):
        return
    if not scores.isfinite().all():
        raise UserError(
            f"model '{side.name}' gives values that are not finite for the first pictures: look at its "
            "weights, or at the mean and std of its pictures"
        )
    if task.logits and are_probabilities(scores):
        side.notes.append(
            "warning: its scores are probabilities: its output ends in a softmax, and what goes in is "
            "wanted; take that layer off"
        )


def _check_pictures(parts: Parts, sample: Batch) -> None:
    """Looks at the first pictures as the data set gives them, and says where their values are odd.

    Raises:
        UserError: they are no pictures `(C, H, W)`, uint8 or floating point.
    """
    images: Any = sample.images
    if isinstance(images, dict):
        raise UserError("samples are mappings; give (image, target)")
    pictures = [picture for picture in images if isinstance(picture, Tensor)]
    for picture in pictures:
        shape = tuple(picture.shape)
        if len(shape) != 3 or (shape[0] > 4 and shape[2] in (1, 3, 4) and shape != parts.data.image_shape):
            raise UserError(f"pictures have the shape {shape}, where (C, H, W) belongs")
        if picture.dtype != torch.uint8 and not picture.is_floating_point():
            kind = str(picture.dtype).removeprefix("torch.")
            raise UserError(f"pictures are {kind}: give uint8 of 0 to 255, or floating point of 0 to 1")
    floats = [picture for picture in pictures if picture.is_floating_point()]
    low = min((float(picture.min()) for picture in floats), default=0.0)
    high = max((float(picture.max()) for picture in floats), default=1.0)
    if low < -_SLACK or high > 1 + _SLACK:
        note = (
            f"warning: pictures hold floating-point values of {low:.3g} to {high:.3g}, where 0 to 1 is "
            "meant, and the data's mean and std are of that scale"
        )
        parts.data = replace(parts.data, notes=(*parts.data.notes, note))


def _answers(what: str, side: Side, task: Task, sample: Batch) -> Any:
    """What a model gives, run once; UserError where it cannot take such pictures."""
    training = side.model.training
    side.model.eval()
    try:
        with torch.no_grad():
            return side.forward(task, sample)
    except UserError:
        raise
    except Exception as error:  # of a model of anybody's own
        size = tuple(sample.images[0].shape)
        first = first_line(error) if isinstance(error, RuntimeError | ValueError) else told(error)
        raise UserError(f"{what} '{side.name}' cannot take pictures of {size}: {first}") from error
    finally:
        side.model.train(training)
