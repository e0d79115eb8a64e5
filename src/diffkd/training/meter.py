"""Where a run is, and sums of its losses that do not make the host wait."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffkd.runs.folder import History

AllReduce = Callable[[Tensor, str], Tensor]


@dataclass
class Place:
    """Where a run is. Saved with every checkpoint.

    Attributes:
        epoch, batch: the next batch to run; step: optimizer steps done.
        history: one row per finished epoch.
        sums: sums over the epoch under way, so that an epoch entered again reports all of itself.
        scalars: names of the last evaluation's single figures; arrays: its figures of several numbers.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    history: History = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    scalars: list[str] = field(default_factory=list)
    arrays: dict[str, Any] = field(default_factory=dict)


class Meter:
    """Sums of the losses on their device; the host reads them only where it wants to show them."""

    def __init__(self, sums: Mapping[str, float]) -> None:
        self.names: list[str] = []
        self._before = dict(sums)
        self._total: Tensor | None = None
        self._last: Tensor | None = None
        self._bad: Tensor | None = None
        self._count = 0

    def add(self, values: Mapping[str, Tensor], step: int) -> None:
        """Counts one batch in, and remembers the first step at which a value was not finite."""
        now = torch.stack([v.detach().float() for v in values.values()])
        if self._total is None or self._bad is None:
            self.names = list(values)
            start = [self._before.get(name, 0.0) for name in self.names]
            self._total = torch.tensor(start, device=now.device, dtype=torch.float64)
            self._bad = torch.full_like(now, -1)
            self._count = int(self._before.get("_count", 0))
        self._total += now
        self._bad = torch.where((self._bad < 0) & ~now.isfinite(), float(step), self._bad)
        self._last = now
        self._count += 1

    def last(self) -> dict[str, float]:
        """The values of the last batch."""
        return dict(zip(self.names, self._last.tolist(), strict=True)) if self._last is not None else {}

    def sums(self) -> dict[str, float]:
        """What is needed to go on counting."""
        if self._total is None:
            return dict(self._before)
        return dict(zip(self.names, self._total.tolist(), strict=True)) | {"_count": float(self._count)}

    def means(self, all_reduce: AllReduce) -> dict[str, float]:
        """Means over the epoch, and over the processes."""
        if self._total is None:
            return {}
        mean = all_reduce(self._total / max(self._count, 1), "mean")
        return dict(zip(self.names, mean.tolist(), strict=True))

    def first_not_finite(self, all_reduce: AllReduce) -> tuple[str, int] | None:
        """Name and step of the first value that was not finite."""
        if self._bad is None:
            return None
        bad = all_reduce(self._bad, "max").tolist()
        found = [(int(step), name) for name, step in zip(self.names, bad, strict=True) if step >= 0]
        return (min(found)[1], min(found)[0]) if found else None
