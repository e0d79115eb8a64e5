"""Default taps that are named in part: what is left to be found is found here, by running the models."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffkd.features.outputs import entries_of
from diffkd.features.stages import find_stages
from diffkd.features.watch import dry_run

LAST_MAP = "?map"  # stands for the last feature map in front of the head
SCORES = "?scores"  # stands for the class scores in the output


class Look(NamedTuple):
    """What it takes to look at a model.

    Attributes:
        model: any module.
        run: runs it on a sample.
        image_size: `(H, W)` of the sample's pictures.
    """

    model: nn.Module
    run: Callable[[], Any]
    image_size: tuple[int, ...] | None

    @property
    def stages(self) -> list[str]:
        """The last layer of each resolution."""
        return find_stages(self.model, self.run, self.image_size)


def found_taps(
    told: Mapping[str, str], student: Look, teacher: Look, logits: Sequence[str]
) -> dict[str, str]:
    """Taps with layers in place of `LAST_MAP` and `SCORES`; where there is no such map, without that pair.

    Args:
        told: student layer to teacher layer.
        student: the student.
        teacher: the teacher.
        logits: taps that may be class scores, in the order in which they are looked for.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    >>> side = Look(net, lambda: net(torch.rand(1, 3, 8, 8)), (8, 8))
    >>> found_taps({LAST_MAP: "decoder", SCORES: "head"}, side, side, ("",))
    {'1': 'decoder', '': 'head'}
    """
    pairs = []
    for pair in told.items():
        ours, theirs = (_found(tap, side, logits) for tap, side in zip(pair, (student, teacher), strict=True))
        for side, layer in (("student", ours), ("teacher", theirs)):
            if layer is None:
                say_no_map(side)
        if ours is not None and theirs is not None:
            pairs.append((ours, theirs))
    return dict(pairs)


def say_no_map(side: str) -> None:
    """Warns that a model has no feature map to learn from."""
    warnings.warn(
        f"no feature map was found in the {side} in front of its head: only outputs are tapped; "
        "name layers with taps",
        stacklevel=6,
    )


def _found(tap: str, side: Look, logits: Sequence[str]) -> str | None:
    if tap == LAST_MAP:
        return next(iter(side.stages[-1:]), None)
    if tap != SCORES:
        return tap
    with dry_run(side.model), torch.no_grad():
        output = side.run()
    entries = {} if isinstance(output, Tensor) else entries_of(output)
    return next((name for name in logits if name[1:-1] in map(str, entries)), "")
