"""Which feature of the student learns from which of the teacher: by name, by key, by stride."""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from diffkd.errors import UserError

SCORES = ("[logits]",)  # of a model's output, class scores by its name
# Maps whose strides differ by less belong together: ratios of rounded sizes are not exact.
SAME_STRIDE = 1.33


@dataclass(frozen=True)
class Feature:
    """What a tap hands out, as the dry run found it.

    Attributes:
        layer: path of the layer in its model; "" is the model's output.
        shape: `(C, *S)`: channels first, no batch axis, `S` empty for vectors.
    """

    layer: str
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Size of the channel axis."""
        return self.shape[0]

    @property
    def spatial_dims(self) -> int:
        """Number of spatial axes: 0 for vectors, 2 for maps."""
        return len(self.shape) - 1


@dataclass(frozen=True)
class Pair:
    """A student's feature and the teacher's that it is matched with.

    Attributes:
        name: key of the pair's tensors in `Method.forward`, and the middle of its losses' names.
        is_logits: both sides are class scores, class axis first.
    """

    name: str
    student: Feature
    teacher: Feature
    is_logits: bool = False


@dataclass(frozen=True)
class Probed:
    """All that the taps of one model gave in the dry run.

    Attributes:
        shapes: `(C, *S)` of each feature by its name.
        seen: `(H, W)`, or any number of axes, of the pictures as the first layer saw them: resized and
            padded, where the model does that itself; None where unknown.
    """

    shapes: Mapping[str, tuple[int, ...]]
    seen: tuple[int, ...] | None = None

    def entries(self, tap: str) -> list[str]:
        """The features that a tap gave: one of its own name, or one per entry of a list or dict."""
        tap = tap.partition("@")[0]  # the layout is no part of the name
        return [tap] if tap in self.shapes else [name for name in self.shapes if name.startswith(f"{tap}[")]

    def stride(self, name: str) -> float | None:
        """Pixels of the picture per position along an axis; None for what is no map of the picture.

        >>> Probed({"p3": (256, 100, 168)}, (800, 1344)).stride("p3")
        8.0
        """
        size = self.shapes[name][1:]
        if not size or self.seen is None or len(size) != len(self.seen):
            return None
        ratios = [full / small for full, small in zip(self.seen, size, strict=True)]
        return math.prod(ratios) ** (1 / len(ratios))


def pair_up(
    taps: Mapping[str, str], student: Probed, teacher: Probed, logits: Sequence[str]
) -> tuple[Pair, ...]:
    """Pairs of the tapped features; a tap that gives several gives as many pairs.

    Entries that have names in common pair by name; levels of a pyramid by stride, whatever their keys and
    positions; what has no counterpart is left out and said in a warning.

    Args:
        taps: student layer path to teacher layer path.
        student: what the student's taps gave.
        teacher: what the teacher's gave.
        logits: names of features that are class scores.

    Raises:
        UserError: entries have no counterpart, or class scores are of different classes.

    >>> ours = Probed({"fpn[0]": (8, 8, 8), "fpn[1]": (8, 4, 4)}, (64, 64))
    >>> theirs = Probed({"fpn[0]": (16, 4, 4), "fpn[pool]": (16, 8, 8)}, (64, 64))
    >>> [(p.student.layer, p.teacher.layer) for p in pair_up({"fpn": "fpn"}, ours, theirs, ())]
    [('fpn[0]', 'fpn[pool]'), ('fpn[1]', 'fpn[0]')]
    """
    pairs = []
    _say_no_scores(taps, student, logits)
    for student_tap, teacher_tap in taps.items():
        for a, b in _matches(student_tap, teacher_tap, student, teacher):
            is_logits = all(name in (*logits, *SCORES) for name in (a, b))
            pair = Pair(
                a or "output", Feature(a, student.shapes[a]), Feature(b, teacher.shapes[b]), is_logits
            )
            if is_logits and pair.student.channels != pair.teacher.channels:
                raise UserError(
                    f"the student has {pair.student.channels} classes, the teacher {pair.teacher.channels}; "
                    "distil features only, or bring a teacher made for these classes"
                )
            pairs.append(pair)
    return tuple(pairs)


def _matches(student_tap: str, teacher_tap: str, student: Probed, teacher: Probed) -> list[tuple[str, str]]:
    """Names of the features of one tap that belong together."""
    ours, theirs = student.entries(student_tap), teacher.entries(teacher_tap)
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    common = {_key(name): name for name in theirs}
    by_key = [(name, common[_key(name)]) for name in ours if _key(name) in common]
    words = any(not _is_level(_key(name)) for name, _ in by_key)
    strides = [student.stride(name) for name in ours] + [teacher.stride(name) for name in theirs]
    if not words and None not in strides:
        found = _by_stride(student_tap, ours, theirs, student, teacher)
    elif words or len(ours) == len(theirs) == len(by_key) or _are_strides(ours, theirs):
        found = by_key
    else:
        found = []
    if not found:
        raise UserError(
            f"tap '{student_tap}' gives {len(ours)} feature(s) ({_keys(ours)}), the teacher's "
            f"'{teacher_tap}' {len(theirs)} ({_keys(theirs)}), with no key or stride in common; name single "
            f"ones, such as '{(ours if len(ours) > 1 else theirs)[0]}'"
        )
    _say_left_out(student_tap, ours, theirs, found, student, teacher)
    return found


def _by_stride(
    tap: str, ours: list[str], theirs: list[str], student: Probed, teacher: Probed
) -> list[tuple[str, str]]:
    """Levels of one stride; several of one stride in their order, the deepest where one side has one."""
    found: list[tuple[str, str]] = []
    for level in _levels(ours, student):
        stride = student.stride(level[0])
        mates = [name for name in theirs if _same_stride(stride, teacher.stride(name))]
        # Of a single position, deeper levels cannot be told from each other by their size.
        tiny = all(math.prod(student.shapes[name][1:]) == 1 for name in level)
        if not tiny and 1 in (len(level), len(mates)):
            level, mates = level[-1:], mates[-1:]
        if mates and len(mates) != len(level) and not tiny:
            raise UserError(
                f"tap '{tap}': of stride {_rounded(stride)} the student has {len(level)} ({_keys(level)}), "
                f"the teacher {len(mates)} ({_keys(mates)}); name single ones, such as '{level[-1]}'"
            )
        found += zip(level, mates, strict=False)
    if not found:
        raise UserError(
            f"tap '{tap}': the student's maps have strides {_strides(ours, student)}, the teacher's "
            f"{_strides(theirs, teacher)}: none in common; tap layers of one stride"
        )
    return found


def _levels(names: list[str], side: Probed) -> Iterator[list[str]]:
    """Features of one stride together, in the order of the first of each."""
    left = list(names)
    while left:
        level = [name for name in left if _same_stride(side.stride(left[0]), side.stride(name))]
        left = [name for name in left if name not in level]
        yield level


def _same_stride(a: float | None, b: float | None) -> bool:
    assert a is not None
    assert b is not None
    return max(a, b) / min(a, b) < SAME_STRIDE


def _say_left_out(
    tap: str,
    ours: list[str],
    theirs: list[str],
    found: list[tuple[str, str]],
    student: Probed,
    teacher: Probed,
) -> None:
    """One warning of all that has no counterpart."""
    left = []
    for who, names, side, used in (
        ("student", ours, student, {a for a, _ in found}),
        ("teacher", theirs, teacher, {b for _, b in found}),
    ):
        names = [name for name in names if name not in used]
        if names:
            strides = [side.stride(name) for name in names]
            told = "" if None in strides else f" (stride {_strides(names, side)})"
            left.append(f"the {who}'s {_keys(names)}{told}")
    if left:
        warnings.warn(
            f"tap '{tap}': {len(found)} pairs; without a counterpart and left out: {', '.join(left)}",
            stacklevel=7,
        )


def _say_no_scores(taps: Mapping[str, str], student: Probed, logits: Sequence[str]) -> None:
    """Warns where a tap of class scores gives several tensors, of which none is taken."""
    for tap in logits:
        entries = student.entries(tap) if tap in taps else []
        if entries and entries != [tap.partition("@")[0]]:
            warnings.warn(
                f"the student's output has the entries {', '.join(entries)}: none is taken for class scores; "
                f"say which, such as logits=('{entries[0]}',)",
                stacklevel=6,
            )


def _key(name: str) -> str:
    match = re.search(r"\[([^\[\]]+)\]$", name)
    return match[1] if match else ""


def _keys(names: list[str]) -> str:
    return ", ".join(_key(name) or name or "output" for name in names)


def _is_level(key: str) -> bool:
    """Whether a key only numbers the levels of a pyramid, as `0`, `p6` and `pool` do."""
    return re.fullmatch(r"\d*|[a-z]{1,3}_?\d+|pool", key, re.IGNORECASE) is not None


def _are_strides(ours: list[str], theirs: list[str]) -> bool:
    """Whether all keys are strides: powers of two, not counted from 0."""
    numbers = [int(key) for key in map(_key, [*ours, *theirs]) if key.isdecimal()]
    return len(numbers) == len(ours) + len(theirs) and all(n > 1 and n & (n - 1) == 0 for n in numbers)


def _strides(names: list[str], side: Probed) -> str:
    return ", ".join(_rounded(side.stride(name)) for name in names)


def _rounded(stride: float | None) -> str:
    return "none" if stride is None else str(round(stride))
