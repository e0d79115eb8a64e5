"""What a distillation method is: tensors in, named losses out."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.maps import matched
from diffkd.features.pairs import Feature as Feature
from diffkd.features.pairs import Pair as Pair
from diffkd.maths.layers import conv
from diffkd.maths.losses import check_classes, check_positive, precise, squared_error, usual_temperature
from diffkd.names import load_class

STANDARDIZED_TEMPERATURE = 2.0  # of standardized class scores as published (arXiv 2403.01427)


@dataclass(frozen=True)
class Setup:
    """All that a method may know when it is built. Channels come from a dry run, nobody types them.

    Attributes:
        pairs: the tap pairs of the run, in the order of the forward pass.
        student, teacher: the models, for methods that reuse a part of one. A method that keeps a
            reference to the teacher holds it in a tuple, so that it is not among its parameters.
        num_classes: None where the task has none.
        dataset_size: number of training samples, for methods with a memory; None where unknown.
        independent: class scores stand for a sigmoid each, for a picture may show several classes.
    """

    pairs: tuple[Pair, ...]
    student: nn.Module = field(repr=False)
    teacher: nn.Module = field(repr=False)
    num_classes: int | None = None
    dataset_size: int | None = None
    independent: bool = False

    @property
    def features(self) -> tuple[Pair, ...]:
        """The pairs that are not logits."""
        return tuple(pair for pair in self.pairs if not pair.is_logits)

    @property
    def logits(self) -> tuple[Pair, ...]:
        """The pairs that are class scores."""
        return tuple(pair for pair in self.pairs if pair.is_logits)


def module_key(name: str) -> str:
    """A pair's name as a key of `nn.ModuleDict`.

    >>> module_key("encoder.layers.3")
    'encoder_layers_3'
    """
    key = name.replace(".", "_")
    return f"{key}_" if hasattr(nn.ModuleDict, key) else key


def shared_key(pair: Pair) -> str:
    """The key of what serves all pairs of one kind: of these widths, axes, and class scores or not.

    >>> shared_key(Pair("p3", Feature("p3", (8, 4, 4)), Feature("p3", (16, 4, 4))))
    'features_8_16_2'
    """
    kind = "scores" if pair.is_logits else "features"
    return f"{kind}_{pair.student.channels}_{pair.teacher.channels}_{pair.student.spatial_dims}"


class Range(NamedTuple):
    """What trials may set an option to: numbers between two, on a logarithmic scale."""

    option: str
    low: float
    high: float


class Choice(NamedTuple):
    """What trials may set an option to: one of some plain values."""

    option: str
    values: tuple[bool | int | float | str, ...]


class Method(nn.Module, ABC):
    """Base of every distillation method.

    A subclass takes the `Setup` and its own keyword options, builds what it trains, and returns
    its named losses. The weight of the whole method is applied outside of it.

    Attributes:
        stages: which feature pairs are tapped for it where the user names none: the last map, one
            map of each resolution, or none.
        uses_logits: whether it wants the models' class scores.
        binary: whether it can do with scores of classes that do not exclude one another; where not, it
            gets features alone.
        weight: of all its losses beside the supervised ones, where the user says none: its paper's.
        standardized_weight: the same with `standardize=True`, where that was published with another.
        search: options worth a choice by trials beside the weight, and between what.
        batch_statistics: whether the teacher's BatchNorm uses each batch's statistics in training.
        figures: scalars worth watching that are not losses (detached), refreshed by `forward`; named in
            the constructor, they do not have a compiled method compiled again.
    """

    stages: ClassVar[Literal["none", "last", "all"]] = "last"
    uses_logits: ClassVar[bool] = True
    binary: ClassVar[bool] = False
    weight: ClassVar[float] = 1.0
    standardized_weight: ClassVar[float | None] = None
    search: ClassVar[tuple[Range | Choice, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.figures: dict[str, Tensor] = {}
        self.batch_statistics = False

    @classmethod
    def usual_weight(cls, options: Mapping[str, Any]) -> float:
        """The weight that its paper gives it with these options."""
        if options.get("standardize") and cls.standardized_weight is not None:
            return cls.standardized_weight
        return cls.weight

    @classmethod
    def leaves_scores(cls, options: Mapping[str, Any]) -> bool:
        """Whether class scores are left to a method beside it that compares them and nothing else."""
        return False

    @abstractmethod
    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Named losses, each a scalar.

        Args:
            student: the student's features `(B, C, *S)` by pair name.
            teacher: the teacher's, detached.
            batch: the batch that made them.
        """

    def expect(self, passes: int) -> None:
        """Hears how many training batches the run will have, for what is done in a part of it."""

    def matched(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """By pair name, what the method brings the two features to before it compares them.

        Empty where it compares them as they are.
        """
        return {}


def check_pair(pair: Pair, method: str, *, resizes: bool = True) -> None:
    """Refuses a pair of features of different kinds, and says where the method will resize one.

    Raises:
        UserError: one is a map and the other a sequence, say.
    """
    ours, theirs = pair.student.shape, pair.teacher.shape
    if len(ours) != len(theirs):
        raise UserError(
            f"method '{method}', tap '{pair.name}': the student's {ours} and the teacher's {theirs} "
            "differ in their spatial axes; tap layers that give features of one kind"
        )
    if resizes and ours[1:] != theirs[1:]:
        warnings.warn(f"tap '{pair.name}': {resizing(ours[1:], theirs[1:])}", stacklevel=4)


def resizing(ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    """That, and how, two spatial sizes are matched, in words."""
    return f"maps of {ours} (student) and {theirs} (teacher): the larger is resized to the smaller"


def needed_features(setup: Setup, method: str, *, resizes: bool = True) -> tuple[Pair, ...]:
    """The pairs that are not logits, each of two features of one kind.

    Args:
        setup: what the run taps.
        method: what errors call the method.
        resizes: whether the method brings both sides of a pair to one size.

    Raises:
        UserError: there is none, or two features of a pair are of different kinds.
    """
    if not setup.features:
        raise UserError(f"method '{method}' needs a feature map to distil; set taps")
    for pair in setup.features:
        check_pair(pair, method, resizes=resizes)
    return setup.features


def needed_logits(setup: Setup, method: str, *, standardized: bool = False) -> tuple[Pair, ...]:
    """The pairs that are class scores, two classes at least.

    Args:
        setup: what the run taps.
        method: what errors call the method.
        standardized: the method brings each sample's scores to mean 0 and deviation 1.

    Raises:
        UserError: there is none, it is not of that kind, or it has too few classes to teach anything.
    """
    if not setup.logits and setup.independent:
        raise UserError(
            f"method '{method}' sends class scores through a softmax, which task.multi_label has not: use "
            "kd, or a method on features"
        )
    if not setup.logits:
        raise UserError(
            f"method '{method}' needs class scores to distil; tap the models' output: taps={{'': ''}}"
        )
    for pair in setup.logits:
        check_pair(pair, method)
        if not setup.independent:
            check_classes(pair.name, pair.teacher.channels)
        if standardized and pair.teacher.channels == 2:
            raise UserError(
                f"method '{method}', tap '{pair.name}': of two standardized class scores only their order is "
                "left, which teaches nothing; set standardize=false"
            )
    return setup.logits


def temperature_for(pair: Pair, chosen: float | None, *, standardized: bool = False) -> float:
    """The temperature of a pair's class scores, or the usual one where none was chosen.

    Standardized scores are published with half the temperature of others.

    Raises:
        UserError: the chosen one is not above 0.
    """
    if chosen is not None:
        check_positive(temperature=chosen)
        return chosen
    if standardized:
        return STANDARDIZED_TEMPERATURE
    return usual_temperature(per_position=pair.student.spatial_dims > 0)


def warn_of_two_classes(pairs: Sequence[Pair], loss: str) -> None:
    """Says where a loss that compares more than two classes with each other has nothing to do."""
    for pair in pairs:
        if pair.teacher.channels == 2:
            warnings.warn(
                f"tap '{pair.name}': of two classes the loss '{loss}' teaches nothing", stacklevel=4
            )


def regressors(pairs: Sequence[Pair], *, always: bool = True) -> nn.ModuleDict:
    """By module key, what brings the student's channels to the teacher's: 1x1 convolutions.

    Args:
        pairs: of features.
        always: also where the channels are equal; else nothing is changed there.
    """
    found = nn.ModuleDict()
    for pair in pairs:
        ours, theirs = pair.student.channels, pair.teacher.channels
        same = ours == theirs and not always
        found[module_key(pair.name)] = (
            nn.Identity() if same else conv(pair.student.spatial_dims, ours, theirs)
        )
    return found


def needed_maps(pairs: Sequence[Pair], method: str) -> None:
    """Refuses pairs that are not maps.

    Raises:
        UserError: one is not.
    """
    for pair in pairs:
        if pair.student.spatial_dims != 2 or pair.teacher.spatial_dims != 2:
            raise UserError(
                f"method '{method}', tap '{pair.name}': serves maps (C, H, W), not {pair.student.shape}; "
                "tap feature maps of a dense model"
            )


class Regression(Method):
    """Mean squared error of the teacher's feature and what a 1x1 convolution makes of the student's.

    A method that measures another distance of the two says `distance`.

    Attributes:
        always: whether features of the teacher's width pass a convolution too.

    Args:
        setup: what the run taps.

    Raises:
        UserError: no feature is tapped, or the two of a pair are of different kinds.
    """

    uses_logits = False
    always: ClassVar[bool] = True

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.pairs = needed_features(setup, type(self).__name__.lower())
        self.regressors = regressors(self.pairs, always=self.always)

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The distance, by pair."""
        losses: dict[str, Tensor] = {}
        for pair in self.pairs:
            ours, theirs, valid = matched(student[pair.name], teacher[pair.name].detach(), batch.valid)
            ours = self.regressors[module_key(pair.name)](ours)
            losses[f"{pair.name}.kd"] = self.distance(precise(ours), precise(theirs), valid)
        return losses

    def distance(self, ours: Tensor, theirs: Tensor, valid: Tensor | None) -> Tensor:
        """Of two features `(B, C, *S)` of one size and width; `valid` is `(B, *S)`, None for all."""
        return squared_error(ours, theirs, valid)


def method_class(name: str) -> type[Method]:
    """The class of a method by its name (`diffkd`, `kd`) or place (`my_losses:MyLoss`).

    Raises:
        UserError: there is none of that name; the nearest names are given.
    """
    return load_class("diffkd.methods", name, Method)  # type: ignore[type-abstract]
