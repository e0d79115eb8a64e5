"""Which methods somebody chose: by name or object, with weights, taps of their own and schedules."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diffkd.errors import UserError, nearest, told
from diffkd.methods.base import Method, Pair, Setup, method_class
from diffkd.names import options_of

MethodChoice = float | str | Mapping[str, Any] | Callable[[Setup], Method] | None


class Chosen(NamedTuple):
    """A method that somebody chose.

    Attributes:
        build: makes it of a Setup.
        weight: of all its losses; the first one, where it is measured.
        automatic: the weight is measured.
        taps: factors of the weight by tap, the student's layers; None where it learns from all taps alike.
        schedule: factors of the weight over the run, as `factor_at` takes them; empty where it is constant.
    """

    build: Any
    weight: float
    automatic: bool = False
    taps: Mapping[str, float] | None = None
    schedule: tuple[tuple[float, float], ...] = ()

    @property
    def of_scores(self) -> bool:
        """Whether it compares class scores and nothing else."""
        return getattr(self.build, "stages", "last") == "none" and getattr(self.build, "uses_logits", True)

    def pairs(
        self, name: str, offered: Sequence[Pair], *, scores_taught: bool = False
    ) -> tuple[tuple[Pair, ...], dict[str, float]]:
        """The pairs that it learns from, and the factors of its weight by pair name where they differ.

        Args:
            name: what errors call it.
            offered: the pairs that it may have.
            scores_taught: another method of the run compares class scores.

        Raises:
            UserError: a tap was chosen for it that there is not.
        """
        if self.taps is None:
            features = tuple(pair for pair in offered if not pair.is_logits)
            leaves = scores_taught and features and getattr(self.build, "leaves_scores", False)
            if leaves and len(features) < len(offered):
                warnings.warn(f"method '{name}' leaves the class scores to the other method", stacklevel=4)
            return features if leaves else tuple(offered), {}
        found: dict[str, float] = {}
        for tap, factor in self.taps.items():
            layer = tap.partition("@")[0]
            names = [p.name for p in offered if layer in (p.student.layer, p.student.layer.partition("[")[0])]
            if not names:
                known = [p.student.layer for p in offered]
                raise UserError(f"method '{name}': tap '{tap}' is not among its taps{nearest(tap, known)}")
            found |= dict.fromkeys(names, factor)
        chosen = tuple(pair for pair in offered if pair.name in found)
        return chosen, found if set(found.values()) != {1.0} else {}


def share_of(loss: str, shares: Mapping[str, float], method: str) -> float:
    """The factor of a named loss, which begins with the name of its pair.

    Raises:
        UserError: the loss is one of all pairs together.

    >>> share_of("layer4.kd", {"layer4": 0.5, "layer3": 2.0}, "fitnet")
    0.5
    """
    names = [name for name in shares if loss == name or loss.startswith(f"{name}.")]
    if not names:
        raise UserError(
            f"method '{method}' has one loss '{loss}' of all its taps: a weight per tap says nothing to it; "
            "give taps as a list, and the method a weight"
        )
    return shares[max(names, key=len)]


def factor_at(schedule: Sequence[tuple[float, float]], progress: float) -> float:
    """The factor of a weight at a share of the run, on straight lines between `(share, factor)` points.

    >>> [factor_at([(0.0, 0.0), (0.5, 1.0)], t) for t in (0.0, 0.25, 0.9)]
    [0.0, 0.5, 1.0]
    """
    before = schedule[0]
    for point in schedule:
        if progress < point[0]:
            part = (progress - before[0]) / (point[0] - before[0]) if point[0] > before[0] else 1.0
            return before[1] + min(max(part, 0.0), 1.0) * (point[1] - before[1])
        before = point
    return before[1]


def chosen_methods(methods: str | Mapping[str, MethodChoice]) -> dict[str, Chosen]:
    """The methods that somebody named, with weights or options, keyed by a name fit for a module.

    Raises:
        UserError: a name, an option or a weight is impossible.

    >>> chosen_methods({"kd": {"weight": 0.5, "temperature": 2.0}})["kd"].weight
    0.5
    """
    if isinstance(methods, str):
        methods = dict.fromkeys(name.strip() for name in methods.split("+"))
    if not isinstance(methods, Mapping):
        raise UserError('methods: a name, or names with weights such as {"diffkd": 1.0, "kd": 0.5}')
    found: dict[str, Chosen] = {}
    for name, choice in methods.items():
        stem = key = name.rpartition(":")[2].replace(".", "_")
        count = 1
        while key in found or key == "task":  # of another file; or what supervised losses are called
            count += 1
            key = f"{stem}_{count}"
        found[key] = _chosen(name, choice)
    return found


def _chosen(name: str, choice: MethodChoice) -> Chosen:
    weight: float | str | None = None
    taps: Any = None
    schedule: Any = ()
    if choice is None or isinstance(choice, Mapping):
        options = dict(choice or {})
        weight, taps = options.pop("weight", None), options.pop("taps", None)
        schedule = options.pop("schedule", None) or ()
        build: Any = _Configured(method_class(name), options)
    elif isinstance(choice, int | float | str):
        weight, build = choice, _Configured(method_class(name), {})
    else:
        build = choice
    automatic = weight == "auto"
    if isinstance(weight, str) and not automatic:
        raise UserError(f"method '{name}': weight '{weight}'; give a number, or auto")
    number = float(getattr(build, "weight", 1.0) if weight is None or automatic else weight)
    if taps is not None:
        taps = dict(taps) if isinstance(taps, Mapping) else dict.fromkeys(taps, 1.0)
    points = tuple((float(at), float(factor)) for at, factor in schedule)
    if automatic and points:
        raise UserError(f"method '{name}': the weight auto is measured; a schedule needs a number")
    if list(points) != sorted(points) or any(not 0 <= at <= 1 for at, _ in points):
        raise UserError(f"method '{name}': schedule: [share of the run, factor] in order: [[0, 1], [1, 0]]")
    for value in (number, *(taps or {}).values(), *(factor for _, factor in points)):
        if value < 0:
            raise UserError(f"method '{name}': weight {value} is negative")
    return Chosen(build, number, automatic, taps, points)


class _Configured:
    """A method's class with its options, waiting for the Setup."""

    def __init__(self, kind: type[Method], options: dict[str, Any]) -> None:
        self.kind, self.options = kind, options
        known = options_of(kind)
        for option in options:
            if option not in known:
                raise UserError(
                    f"method '{kind.__name__}' takes no option '{option}'{nearest(option, known)}"
                )
        self.stages, self.uses_logits = kind.stages, kind.uses_logits
        self.weight = kind.usual_weight(options)
        self.binary, self.leaves_scores = kind.binary, kind.leaves_scores(options)

    def __call__(self, setup: Setup) -> Method:
        try:
            return self.kind(setup, **self.options)  # type: ignore[call-arg]
        except UserError:
            raise
        except Exception as error:
            if self.kind.__module__.startswith("diffkd."):
                raise
            raise UserError(f"method '{self.kind.__name__}' cannot be built: {told(error)}") from error
