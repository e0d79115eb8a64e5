"""Student, frozen teacher, taps and methods in one module, for any training loop."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from diffkd.batch import Batch, as_batch
from diffkd.errors import UserError
from diffkd.features.defaults import Look, found_taps, say_no_map
from diffkd.features.lessons import Lesson, last_stages, lessons_of, taps_by_teacher
from diffkd.features.pairs import Pair, Probed, pair_up
from diffkd.features.roles import Plain, Roles, Run, call_model
from diffkd.features.taps import Taps
from diffkd.features.watch import batch_statistics, dry_run
from diffkd.methods.base import Setup
from diffkd.methods.choice import MethodChoice, chosen_methods, factor_at, share_of


class Losses(dict[str, Tensor]):
    """Named, weighted losses of one batch, each a scalar with its graph.

    Attributes:
        output: the student's output for the batch, to compute the supervised loss from.
        supervised: the losses that the student's own task gave, not among the named ones.
    """

    def __init__(self, output: Any = None, supervised: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.output, self.supervised = output, dict(supervised or {})

    @property
    def total(self) -> Tensor:
        """The sum of all losses; 0 where there are none."""
        if not self:
            return torch.zeros(())
        return torch.stack([loss.float() for loss in self.values()]).sum()


class Distiller(nn.Module):
    """Everything that distillation adds to a training step.

    `parameters()` and `state_dict()` hold the student and what the methods train; the teacher is
    frozen, in eval mode, absent from both, and follows `.to(device)`.

    Args:
        student: the model to train; its `state_dict` keys stay those of the plain model.
        teacher: the model to learn from, or several by name, each with every method of its own; None trains
            the student alone.
        taps: student layer path to teacher layer path; "" is the model's output. None takes what
            the methods want: the last feature map and the output, or one map per resolution. Of several
            teachers it is for all, or by the teacher's name.
        methods: names with a weight, with options (`{"diffkd": {"weight": 1.0, "num_steps": 3}}`),
            or with a function of the `Setup` that builds the method; names alone
            (`"diffkd+kd"`) have their papers' weights. Two of one class name are called `My` and `My_2`.
            The weight "auto" starts there too; `diffkd`'s own training loop then measures and sets it.
            Among the options, `taps` are the student's layers that a method learns from, with a factor of
            its weight each or not (`{"layer3": 0.5, "layer4": 1.0}`, `["layer4"]`), and `schedule` is the
            factor over the run (`[[0, 0.0], [0.1, 1.0], [1, 0.5]]`, straight lines between), see `at`.
        sample: a batch (images alone will do) for the dry run that probes channels and layouts.
        run: how a model is called with a batch.
        task: how models are run in each role, in place of `run`: a `diffkd.Task`, say.
        logits: taps of the model's output that hold class scores.
        student_input, teacher_input: modules that turn the batch's images into what each model
            wants (size, normalisation); None passes them on. Of several teachers one for all, or by name.
        teacher_weights: how much each of several teachers counts, by name; None counts them alike. Their
            methods' weights add up to the weight of the one.
        num_classes, dataset_size: for methods that need them.

    Attributes:
        weights: what each method's losses are multiplied with, by its name in the losses. A loop may change
            them between steps: `distiller.weights["kd"] = 1 - progress`. Of several teachers the names are
            `kd_big` and `kd_wide`, for teachers called big and wide.
        pairs: what learns from what.

    Raises:
        UserError: a layer, method or option does not exist, or a method cannot serve these models.

    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> student, teacher = net(4), net(8)
    >>> distiller = Distiller(student, teacher, {"0": "0", "": ""}, "diffkd", torch.rand(2, 3, 8, 8))
    >>> losses = distiller(torch.rand(2, 3, 8, 8))
    >>> sorted(losses)
    ['diffkd.0.diffusion', 'diffkd.0.kd', 'diffkd.output.kd']
    >>> losses.output.shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Mapping[str, nn.Module] | None,
        taps: Mapping[str, str] | Mapping[str, Mapping[str, str]] | None = None,
        methods: str | Mapping[str, MethodChoice] = "diffkd",
        sample: Any = None,
        *,
        run: Run = call_model,
        task: Roles | None = None,
        logits: Sequence[str] = ("",),
        student_input: nn.Module | None = None,
        teacher_input: nn.Module | Mapping[str, nn.Module] | None = None,
        teacher_weights: Mapping[str, float] | None = None,
        num_classes: int | None = None,
        dataset_size: int | None = None,
    ) -> None:
        super().__init__()
        self._closed, self._shares = False, True
        self._progress: float | None = None
        self._lessons: tuple[Lesson, ...] = ()
        # A tuple of no modules hides the teachers from parameters(), state_dict(), train() and DDP.
        lessons = lessons_of(teacher, teacher_input, teacher_weights)
        _refuse_shared(student, lessons)
        self.student = student
        self.student_input = student_input or nn.Identity()
        self._lessons = lessons
        self._roles = task or Plain(run)
        self._scores = task is not None  # whose outputs begin with class scores
        if sample is None:
            raise UserError("give sample=, a batch of images for the dry run that finds channels and layouts")
        chosen = chosen_methods(methods)
        if not lessons and chosen:
            raise UserError(f"method '{next(iter(chosen))}' needs a teacher")
        self._tap(taps, [choice.build for choice in chosen.values()], self._framed(sample), logits)
        self.methods = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        self._chosen: dict[str, _Taught] = {}
        automatic: list[str] = []
        of_scores = {name for name, choice in chosen.items() if choice.of_scores}
        independent: bool = getattr(self._roles, "independent", False)
        for name, choice in chosen.items():
            scores_taught = bool(of_scores - {name})
            for place, lesson in enumerate(lessons):
                pairs, shares = choice.pairs(name, lesson.wanted(choice.build), scores_taught=scores_taught)
                if independent:
                    binary = getattr(choice.build, "binary", False)
                    pairs = tuple(pair for pair in pairs if binary or not pair.is_logits)
                setup = Setup(pairs, student, lesson.teacher, num_classes, dataset_size, independent)
                key = lesson.key(name)
                self._chosen[key] = _Taught(place, shares, choice.schedule)
                self.weights[key] = choice.weight * lesson.share
                automatic += [key] * choice.automatic
                self.methods[key] = choice.build(setup).to(_device(student))
        self.automatic = tuple(automatic)
        self.measured = nn.Module()
        for name in self.automatic:
            self.measured.register_buffer(f"of_{name}", torch.tensor(self.weights[name] or 1.0))

    if TYPE_CHECKING:

        def __call__(self, batch: Any) -> Losses:
            """As `forward`."""

    def close(self) -> None:
        """Lets the teacher go. The student stays as it is; it never carried anything of the Distiller."""
        if self.pairs:
            del self._student_taps
        self._lessons, self._closed = (), True

    def __enter__(self) -> "Distiller":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher; of several the first."""
        return self._lessons[0].teacher if self._lessons else None

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """What learns from what, of all teachers."""
        return tuple(pair for lesson in self._lessons for pair in lesson.pairs)

    @property
    def pairs_by_teacher(self) -> dict[str, tuple[Pair, ...]]:
        """What learns from what, by the teacher's name; the only one is called `teacher`."""
        return {lesson.name or "teacher": lesson.pairs for lesson in self._lessons}

    def at(self, progress: float) -> None:
        """Says how far the run is, for weights on a schedule; to be called before each step.

        Args:
            progress: the share of the run that is done, 0 to 1.
        """
        self._progress = progress

    def expect(self, batches: int) -> None:
        """Says how many training batches the run will have, for methods that do one thing after another."""
        for method in self.methods.values():
            method.expect(batches)  # type: ignore[operator]

    @property
    def figures(self) -> dict[str, Tensor]:
        """Scalars worth watching that are not losses, of the last forward pass."""
        told = {
            f"{name}.{key}": value
            for name, method in self.methods.items()
            for key, value in method.figures.items()  # type: ignore[union-attr,operator]
        }
        return told | {f"{name}.weight": self.measured.get_buffer(f"of_{name}") for name in self.automatic}

    def weight_of(self, name: str) -> float | Tensor:
        """What a method's losses are multiplied by: a number, or a scalar where that is measured.

        Raises:
            UserError: the weight is on a schedule, and nobody said how far the run is.
        """
        if name in self.automatic:
            # a copy, which the backward pass still finds unchanged after the next measurement
            return self.measured.get_buffer(f"of_{name}").clone()
        schedule = self._chosen[name].schedule
        if not schedule:
            return self.weights[name]
        if self._progress is None:
            raise UserError(f"method '{name}' has a schedule: call distiller.at(progress) before each step")
        return self.weights[name] * factor_at(schedule, self._progress)

    def set_measured(self, name: str, weight: Tensor) -> None:
        """Gives a method whose weight is `auto` a weight, a scalar."""
        self.measured.get_buffer(f"of_{name}").copy_(weight)

    def forward(self, batch: Any) -> Losses:
        """Named losses of a batch, and the student's output.

        Args:
            batch: a Batch, images alone `(B, C, H, W)`, a loader's `(images, targets)`, or a dict of
                keyword inputs.
        """
        batch = self._framed(batch)
        prepared = self._roles.prepare(batch, self.student_input)
        teachers = self._taught(batch, prepared)
        if self.pairs:
            output, supervised = self._student_taps.collect(
                lambda: self._roles.train(self.student, prepared), answer=itemgetter(0)
            )
            students = self._learned()
        else:
            output, supervised = self._roles.train(self.student, prepared)
            students = [{} for _ in self._lessons]
        losses = Losses(output, supervised)
        for name, method in self.methods.items():
            taught = self._chosen[name]
            named: dict[str, Tensor] = method(students[taught.lesson], teachers[taught.lesson], batch)
            weight = self.weight_of(name)
            for key, value in named.items():
                share = share_of(key, taught.shares, name) if taught.shares else 1.0
                losses[f"{name}.{key}"] = value * (weight * share)
        return losses

    def features(self, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The student's features `(B, C, *S)` and the teacher's by pair name, as methods get them.

        Of several teachers those of the first are given.
        """
        batch = self._framed(batch)
        prepared = self._roles.prepare(batch, self.student_input)
        teachers = self._taught(batch, prepared)
        if not self.pairs:
            return {}, {}
        self._student_taps.collect(lambda: self._roles.teach(self.student, prepared))
        return self._learned()[0], teachers[0]

    def _framed(self, batch: Any) -> Batch:
        """The batch as all models see it."""
        if self._closed:
            raise UserError("this Distiller is closed: its teacher is gone; make another one")
        return self._roles.frame(as_batch(batch))

    def _taught(self, batch: Batch, prepared: Batch) -> list[dict[str, Tensor]]:
        """The teachers' features of a framed batch, of each by pair name.

        Args:
            batch: it.
            prepared: as the student sees it. So do teachers to whom the same module is given, if no model
                changes its pictures.
        """
        fresh = self.training and any(getattr(m, "batch_statistics", False) for m in self.methods.values())

        def run(teacher: nn.Module, prepare: nn.Module) -> Any:
            with batch_statistics(teacher) if fresh else nullcontext():
                shared = self._shares and prepare is self.student_input
                return self._roles.teach(teacher, prepared if shared else self._roles.prepare(batch, prepare))

        return [lesson.observe(run) for lesson in self._lessons]

    def _learned(self) -> list[dict[str, Tensor]]:
        """The student's features of its last pass, for each teacher by pair name."""
        features = self._student_taps.read()
        return [{p.name: features[p.student.layer] for p in lesson.pairs} for lesson in self._lessons]

    def _tap(
        self, taps: Mapping[str, Any] | None, builders: list[Any], sample: Batch, logits: Sequence[str]
    ) -> None:
        """Probes the features and pairs them."""
        found = [
            told if told is not None else self._default_taps(lesson, builders, sample, logits)
            for lesson, told in zip(self._lessons, taps_by_teacher(taps, self._lessons), strict=True)
        ]
        layers = dict.fromkeys(layer for chosen in found for layer in chosen)
        if not layers:
            return
        self._student_taps = Taps(self.student, list(layers), scores=self._scores)
        for lesson, chosen in zip(self._lessons, found, strict=True):
            lesson.taps = Taps(lesson.teacher, list(dict.fromkeys(chosen.values())), scores=self._scores)
        students = self._probe(self._student_taps, self.student, self.student_input, sample, "student")
        for lesson, chosen in zip(self._lessons, found, strict=True):
            assert lesson.taps is not None
            teachers = self._probe(lesson.taps, lesson.teacher, lesson.prepare, sample, "teacher")
            lesson.pairs = pair_up(chosen, students, teachers, logits)
        for layer in self._student_taps.without_gradient:
            warnings.warn(
                f"tap '{layer}' of the student gets no gradient: nothing is learned there", stacklevel=4
            )

    def _probe(self, taps: Taps, model: nn.Module, prepare: nn.Module, sample: Batch, side: str) -> Probed:
        prepared = self._roles.prepare(sample, prepare)
        before = _changes(prepared)
        with dry_run(model), torch.set_grad_enabled(side == "student"):
            shapes = taps.probe(lambda: self._roles.teach(model, prepared), _image_size(prepared.images))
        self._shares &= _changes(prepared) == before
        return Probed(shapes, taps.seen)

    def _default_taps(
        self, lesson: Lesson, builders: list[Any], sample: Batch, logits: Sequence[str]
    ) -> dict[str, str]:
        """What the methods want, of what the two models have."""
        student = self._look(self.student, self._roles.prepare(sample, self.student_input))
        teacher = self._look(lesson.teacher, self._roles.prepare(sample, lesson.prepare))
        told = self._roles.taps(self.student, lesson.teacher)
        if told is not None:
            told = found_taps(told, student, teacher, logits)
            lesson.stages = dict.fromkeys(told, "told")
            return told
        wants = {getattr(build, "stages", "last") for build in builders}
        taps: dict[str, str] = {}
        lesson.stages = {}
        if wants & {"last", "all"}:
            ours, theirs = student.stages, teacher.stages
            for name, found in (("student", ours), ("teacher", theirs)):
                if not found:
                    say_no_map(name)
            taps, lesson.stages = last_stages(ours, theirs, wants)
        if any(getattr(build, "uses_logits", True) for build in builders):
            taps |= {tap: tap for tap in logits}
        return taps

    def _look(self, model: nn.Module, prepared: Batch) -> Look:
        return Look(model, lambda: self._roles.teach(model, prepared), _image_size(prepared.images))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        for lesson in self._lessons:
            for module in (lesson.teacher, lesson.prepare):
                module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]


class _Taught(NamedTuple):
    """A method of one teacher: which one's it is, and factors of its weight by pair and over the run."""

    lesson: int
    shares: Mapping[str, float]
    schedule: tuple[tuple[float, float], ...]


def _refuse_shared(student: nn.Module, lessons: Sequence[Lesson]) -> None:
    own = {id(parameter) for parameter in student.parameters()}
    for lesson in lessons:
        shared = own & {id(parameter) for parameter in lesson.teacher.parameters()}
        if shared:
            raise UserError(f"student and teacher share {len(shared)} weights; deep-copy the teacher")


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _image_size(images: Any) -> tuple[int, ...] | None:
    if isinstance(images, list):
        return tuple(images[0].shape[1:])
    return tuple(images.shape[2:]) if isinstance(images, Tensor) else None


def _changes(batch: Batch) -> int:
    """How often a batch's pictures were changed in place so far."""
    images: Any = batch.images
    held = images.values() if isinstance(images, Mapping) else images
    held = [held] if isinstance(held, Tensor) else held
    return sum(image._version for image in held if isinstance(image, Tensor))
