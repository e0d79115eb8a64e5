"""Student, frozen teacher, taps and methods in one module, for any training loop."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from diffkd.batch import Batch, as_batch
from diffkd.errors import UserError
from diffkd.features.defaults import Look, found_taps, say_no_map
from diffkd.features.pairs import Pair, Probed, pair_up
from diffkd.features.taps import Taps
from diffkd.features.watch import dry_run
from diffkd.methods.base import MethodChoice, Setup, chosen_methods

Run = Callable[[nn.Module, Batch], Any]


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


def call_model(model: nn.Module, batch: Batch) -> Any:
    """The usual forward pass: the model called with the batch's images, a dict as keywords."""
    images: Any = batch.images
    return model(**images) if isinstance(images, Mapping) else model(images)


class Roles(Protocol):
    """How models are run: what `diffkd.Task` says, and what a loop of one's own may say by `run` alone."""

    def prepare(self, batch: Batch, preprocess: Callable[[Any], Any]) -> Batch:
        """The batch as one model sees it."""
        ...

    def train(self, student: nn.Module, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        """The student's output, and its supervised losses."""
        ...

    def teach(self, teacher: nn.Module, batch: Batch) -> Any:
        """Runs a model as far as its taps go."""
        ...

    def frame(self, batch: Batch) -> Batch:
        """A loader's batch as both models see it, before each one's preparation."""
        ...

    def taps(self, student: nn.Module, teacher: nn.Module) -> dict[str, str] | None:
        """Default taps, of which some may be left to be found (`features.defaults`); None has all found."""
        ...


class _Plain:
    """Models called the same way in every role, without losses of their own."""

    def __init__(self, run: Run) -> None:
        self.teach = run

    def prepare(self, batch: Batch, preprocess: Callable[[Any], Any]) -> Batch:
        return batch._replace(images=preprocess(batch.images))

    def train(self, student: nn.Module, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        return self.teach(student, batch), {}

    def frame(self, batch: Batch) -> Batch:
        return batch

    def taps(self, student: nn.Module, teacher: nn.Module) -> dict[str, str] | None:
        return None


class Distiller(nn.Module):
    """Everything that distillation adds to a training step.

    `parameters()` and `state_dict()` hold the student and what the methods train; the teacher is
    frozen, in eval mode, absent from both, and follows `.to(device)`.

    Args:
        student: the model to train; its `state_dict` keys stay those of the plain model.
        teacher: the model to learn from; None trains the student alone.
        taps: student layer path to teacher layer path; "" is the model's output. None takes what
            the methods want: the last feature map and the output, or one map per resolution.
        methods: names with a weight, with options (`{"diffkd": {"weight": 1.0, "num_steps": 3}}`),
            or with a function of the `Setup` that builds the method; names alone
            (`"diffkd+kd"`) have their papers' weights. Two of one class name are called `My` and `My_2`.
            The weight "auto" starts there too; `diffkd`'s own training loop then measures and sets it.
        sample: a batch (images alone will do) for the dry run that probes channels and layouts.
        run: how a model is called with a batch.
        task: how models are run in each role, in place of `run`: a `diffkd.Task`, say.
        logits: taps of the model's output that hold class scores.
        student_input, teacher_input: modules that turn the batch's images into what each model
            wants (size, normalisation); None passes them on.
        num_classes, dataset_size: for methods that need them.

    Attributes:
        weights: what each method's losses are multiplied with, by its name in the losses. A loop may change
            them between steps: `distiller.weights["kd"] = 1 - progress`.
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
        teacher: nn.Module | None,
        taps: Mapping[str, str] | None = None,
        methods: str | Mapping[str, MethodChoice] = "diffkd",
        sample: Any = None,
        *,
        run: Run = call_model,
        task: Roles | None = None,
        logits: Sequence[str] = ("",),
        student_input: nn.Module | None = None,
        teacher_input: nn.Module | None = None,
        num_classes: int | None = None,
        dataset_size: int | None = None,
    ) -> None:
        super().__init__()
        self._closed = False
        shared = (
            {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()} if teacher else ()
        )
        if shared:
            raise UserError(f"student and teacher share {len(shared)} weights; deep-copy the teacher")
        self.student = student
        self.student_input = student_input or nn.Identity()
        # A tuple hides the teacher from parameters(), state_dict(), train() and DDP.
        self._frozen = _freeze(teacher, teacher_input or nn.Identity()) if teacher is not None else ()
        self._roles = task or _Plain(run)
        if sample is None:
            raise UserError("give sample=, a batch of images for the dry run that finds channels and layouts")
        builders = chosen_methods(dict.fromkeys(methods.split("+")) if isinstance(methods, str) else methods)
        if teacher is None and builders:
            raise UserError(f"method '{next(iter(builders))}' needs a teacher")
        self.weights = {name: choice.weight for name, choice in builders.items()}
        self.automatic = tuple(name for name, choice in builders.items() if choice.automatic)
        self.measured = nn.Module()
        for name in self.automatic:
            self.measured.register_buffer(f"of_{name}", torch.tensor(self.weights[name] or 1.0))
        self.pairs = self._tap(
            taps, [choice.build for choice in builders.values()], self._framed(sample), logits
        )
        self.methods = nn.ModuleDict()
        independent = getattr(self._roles, "independent", False)
        for name, (build, *_) in builders.items():
            assert teacher is not None
            wanted = _wanted(self.pairs, build if taps is None else None, self._stages)
            if independent:
                wanted = tuple(p for p in wanted if not p.is_logits or getattr(build, "binary", False))
            setup = Setup(wanted, student, teacher, num_classes, dataset_size, independent)
            self.methods[name] = build(setup).to(_device(student))

    if TYPE_CHECKING:

        def __call__(self, batch: Any) -> Losses:
            """As `forward`."""

    def close(self) -> None:
        """Lets the teacher go. The student stays as it is; it never carried anything of the Distiller."""
        self._frozen, self._closed = (), True
        if self.pairs:
            del self._student_taps, self._teacher_taps

    def __enter__(self) -> "Distiller":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher."""
        return self._frozen[0] if self._frozen else None

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
        """What a method's losses are multiplied by: a number, or a scalar where that is measured."""
        # a copy, which the backward pass still finds unchanged after the next measurement
        return (
            self.measured.get_buffer(f"of_{name}").clone() if name in self.automatic else self.weights[name]
        )

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
        teacher = self._taught(batch)
        prepared = self._roles.prepare(batch, self.student_input)
        if self.pairs:
            output, supervised = self._student_taps.collect(
                lambda: self._roles.train(self.student, prepared), answer=itemgetter(0)
            )
            student = self._read(self._student_taps, "student")
        else:
            (output, supervised), student = self._roles.train(self.student, prepared), {}
        losses = Losses(output, supervised)
        for name, method in self.methods.items():
            named: dict[str, Tensor] = method(student, teacher, batch)
            for key, value in named.items():
                losses[f"{name}.{key}"] = value * self.weight_of(name)
        return losses

    def features(self, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The student's features `(B, C, *S)` and the teacher's by pair name, as methods get them."""
        batch = self._framed(batch)
        teacher = self._taught(batch)
        if not self.pairs:
            return {}, {}
        prepared = self._roles.prepare(batch, self.student_input)
        self._student_taps.collect(lambda: self._roles.teach(self.student, prepared))
        return self._read(self._student_taps, "student"), teacher

    def _framed(self, batch: Any) -> Batch:
        """The batch as both models see it."""
        if self._closed:
            raise UserError("this Distiller is closed: its teacher is gone; make another one")
        return self._roles.frame(as_batch(batch))

    def _taught(self, batch: Batch) -> dict[str, Tensor]:
        """The teacher's features of a framed batch by pair name."""
        if not self.pairs:
            return {}
        teacher, preprocess = self._frozen
        with torch.no_grad():
            prepared = self._roles.prepare(batch, preprocess)
            self._teacher_taps.collect(lambda: self._roles.teach(teacher, prepared))
        return self._read(self._teacher_taps, "teacher")

    def _read(self, taps: Taps, side: str) -> dict[str, Tensor]:
        """Features by pair name."""
        features = taps.read()
        return {pair.name: features[getattr(pair, side).layer] for pair in self.pairs}

    def _tap(
        self,
        taps: Mapping[str, str] | None,
        builders: list[Any],
        sample: Batch,
        logits: Sequence[str],
    ) -> tuple[Pair, ...]:
        """Probes the features and pairs them."""
        self._stages: dict[str, str] = {}
        if self.teacher is None:
            return ()
        taps = dict(taps) if taps is not None else self._default_taps(builders, sample, logits)
        if not taps:
            return ()
        self._student_taps = Taps(self.student, list(taps))
        self._teacher_taps = Taps(self.teacher, list(dict.fromkeys(taps.values())))
        students = self._probe(self._student_taps, self.student, self.student_input, sample, "student")
        teachers = self._probe(self._teacher_taps, self.teacher, self._frozen[1], sample, "teacher")
        for layer in self._student_taps.without_gradient:
            warnings.warn(
                f"tap '{layer}' of the student gets no gradient: nothing is learned there", stacklevel=4
            )
        return pair_up(taps, students, teachers, logits)

    def _probe(self, taps: Taps, model: nn.Module, prepare: nn.Module, sample: Batch, side: str) -> Probed:
        prepared = self._roles.prepare(sample, prepare)
        with dry_run(model), torch.set_grad_enabled(side == "student"):
            shapes = taps.probe(lambda: self._roles.teach(model, prepared), _image_size(prepared.images))
        return Probed(shapes, taps.seen)

    def _default_taps(self, builders: list[Any], sample: Batch, logits: Sequence[str]) -> dict[str, str]:
        """What the methods want, of what the two models have."""
        assert self.teacher is not None
        student, teacher = (
            self._look(model, self._roles.prepare(sample, preprocess))
            for model, preprocess in ((self.student, self.student_input), self._frozen)
        )
        told = self._roles.taps(self.student, self.teacher)
        if told is not None:
            told = found_taps(told, student, teacher, logits)
            self._stages = dict.fromkeys(told, "told")
            return told
        wants = {getattr(build, "stages", "last") for build in builders}
        taps: dict[str, str] = {}
        if wants & {"last", "all"}:
            ours, theirs = student.stages, teacher.stages
            for name, found in (("student", ours), ("teacher", theirs)):
                if not found:
                    say_no_map(name)
            depth = min(len(ours), len(theirs), 1 if "all" not in wants else len(ours))
            # Stages are matched from the last one back: models differ in their first ones.
            taps = dict(zip(ours[len(ours) - depth :], theirs[len(theirs) - depth :], strict=True))
            self._stages = dict.fromkeys(taps, "all")
            if taps:
                self._stages[list(taps)[-1]] = "last"
        if any(getattr(build, "uses_logits", True) for build in builders):
            taps |= {tap: tap for tap in logits}
        return taps

    def _look(self, model: nn.Module, prepared: Batch) -> Look:
        return Look(model, lambda: self._roles.teach(model, prepared), _image_size(prepared.images))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        for module in self._frozen:
            module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]


def _freeze(teacher: nn.Module, prepare: nn.Module) -> tuple[nn.Module, ...]:
    for parameter in teacher.parameters():  # TorchScript has no `requires_grad_` of its own
        parameter.requires_grad_(False)
    return teacher.eval(), prepare.eval()


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _image_size(images: Any) -> tuple[int, ...] | None:
    if isinstance(images, list):
        return tuple(images[0].shape[1:])
    return tuple(images.shape[2:]) if isinstance(images, Tensor) else None


def _wanted(pairs: tuple[Pair, ...], build: Any | None, stages: Mapping[str, str]) -> tuple[Pair, ...]:
    """Of the default taps' pairs, those that a method asks for; of the user's own taps, all."""
    if build is None:
        return pairs
    wants, uses_logits = getattr(build, "stages", "last"), getattr(build, "uses_logits", True)
    return tuple(
        pair
        for pair in pairs
        if (uses_logits if pair.is_logits else _serves(wants, stages, pair.student.layer))
    )


def _serves(wants: str, stages: Mapping[str, str], layer: str) -> bool:
    """Whether a method that wants some stages gets a layer; those that a task names serve every method."""
    if wants == "none":
        return False
    told = "told" in stages.values()
    return told or wants == "all" or stages.get(layer, stages.get(layer.rpartition("[")[0])) == wants
