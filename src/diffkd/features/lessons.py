"""Teachers side by side: each with its way of seeing pictures, its taps and what is learned from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.errors import UserError
from diffkd.features.pairs import Pair
from diffkd.features.taps import Taps


@dataclass
class Lesson:
    """One frozen teacher, and what the student learns from it.

    Attributes:
        teacher: in eval mode; its weights get no gradient.
        prepare: turns a batch's images into what it wants.
        name: what losses call it; empty for the only one.
        share: of all teachers' losses; the shares add up to 1.
        stages: which default tap is which stage, by the student's layer; None for the user's own taps.
        pairs: what learns from what.
    """

    teacher: nn.Module
    prepare: nn.Module
    name: str = ""
    share: float = 1.0
    stages: Mapping[str, str] | None = None
    pairs: tuple[Pair, ...] = ()
    taps: Taps | None = None

    def observe(self, run: Callable[[nn.Module, nn.Module], Any]) -> dict[str, Tensor]:
        """The teacher's features by pair name, of what `run` gives teacher and preparation."""
        if self.taps is None:
            return {}
        with torch.no_grad():
            self.taps.collect(lambda: run(self.teacher, self.prepare))
        features = self.taps.read()
        return {pair.name: features[pair.teacher.layer] for pair in self.pairs}

    def key(self, method: str) -> str:
        """What a method's losses are called where it learns from this teacher."""
        return f"{method}_{self.name}" if self.name else method

    def wanted(self, build: Any) -> tuple[Pair, ...]:
        """Of the default taps' pairs, those that a method asks for; of the user's own taps, all."""
        if self.stages is None:
            return self.pairs
        wants, uses_logits = getattr(build, "stages", "last"), getattr(build, "uses_logits", True)
        return tuple(
            pair
            for pair in self.pairs
            if (uses_logits if pair.is_logits else _serves(wants, self.stages, pair.student.layer))
        )


def lessons_of(
    teachers: nn.Module | Mapping[str, nn.Module] | None,
    prepare: nn.Module | Mapping[str, nn.Module] | None,
    shares: Mapping[str, float] | None,
) -> tuple[Lesson, ...]:
    """A lesson for each teacher, which is frozen.

    Args:
        teachers: one, several by name, or none.
        prepare: one for all of them, or by name.
        shares: weights by name; None is the mean.

    Raises:
        UserError: names do not fit, or weights are impossible.

    >>> [lesson.share for lesson in lessons_of({"a": nn.ReLU(), "b": nn.ReLU()}, None, {"a": 3, "b": 1})]
    [0.75, 0.25]
    """
    if teachers is None:
        return ()
    if isinstance(teachers, nn.Module):
        if shares is not None or isinstance(prepare, Mapping):
            raise UserError("weights or inputs by name need teachers by name: teacher={'a': ..., 'b': ...}")
        return (Lesson(_frozen(teachers), (prepare or nn.Identity()).eval()),)
    if not teachers or not all(name.isidentifier() for name in teachers):
        raise UserError(f"teachers are called by words of letters, digits and _, not {list(teachers)}")
    for what, named in (("teacher_weights", shares), ("teacher_input", prepare)):
        if isinstance(named, Mapping) and set(named) != set(teachers):
            raise UserError(f"{what} names {sorted(named)}, the teachers are {sorted(teachers)}")
    weights = dict(shares or dict.fromkeys(teachers, 1.0))
    total = sum(weights.values())
    if min(weights.values()) < 0 or total <= 0:
        raise UserError(f"teacher_weights={weights}: none may be negative, and one must be positive")
    seen = prepare if isinstance(prepare, Mapping) else dict.fromkeys(teachers, prepare or nn.Identity())
    return tuple(
        Lesson(_frozen(teacher), seen[name].eval(), name, weights[name] / total)
        for name, teacher in teachers.items()
    )


def taps_by_teacher(
    taps: Mapping[str, str] | Mapping[str, Mapping[str, str]] | None, lessons: Sequence[Lesson]
) -> list[dict[str, str] | None]:
    """The taps of each lesson: the same for all, or by the teacher's name.

    Raises:
        UserError: taps by name lack a teacher.
    """
    if taps is None:
        return [None] * len(lessons)
    found: list[dict[str, str] | None] = []
    for lesson in lessons:
        own: Any = taps
        if any(isinstance(value, Mapping) for value in taps.values()):
            own = taps.get(lesson.name)
            if not isinstance(own, Mapping):
                raise UserError(f"taps by teacher: '{lesson.name}' has none")
        found.append(dict(own))
    return found


def last_stages(
    student: Sequence[str], teacher: Sequence[str], wants: set[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Default taps, and which stage each is: stages are matched from the last one back.

    >>> last_stages(["a", "b"], ["x", "y", "z"], {"last"})
    ({'b': 'z'}, {'b': 'last'})
    """
    depth = min(len(student), len(teacher), 1 if "all" not in wants else len(student))
    taps = dict(zip(student[len(student) - depth :], teacher[len(teacher) - depth :], strict=True))
    stages = dict.fromkeys(taps, "all")
    if taps:
        stages[list(taps)[-1]] = "last"
    return taps, stages


def _frozen(teacher: nn.Module) -> nn.Module:
    for parameter in teacher.parameters():  # TorchScript has no `requires_grad_` of its own
        parameter.requires_grad_(False)
    return teacher.eval()


def _serves(wants: str, stages: Mapping[str, str], layer: str) -> bool:
    """Whether a method that wants some stages gets a layer; those that a task names serve every method."""
    if wants == "none":
        return False
    told = "told" in stages.values()
    return told or wants == "all" or stages.get(layer, stages.get(layer.rpartition("[")[0])) == wants
