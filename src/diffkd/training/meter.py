"""Where a run is, and sums of its losses that do not make the host wait."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from diffkd.runs.folder import History

AllReduce = Callable[[Tensor, str], Tensor]


@dataclass
class Place:
    """Where a run is. Saved with every checkpoint; means the same on any number of processes.

    Attributes:
        epoch, batch: the next batch to run, of all processes together; step: optimizer steps done.
        seconds: of training since the last row of history.
        history: one row per evaluation.
        sums: sums over the batches since the last row, so that a run that goes on reports all of them.
        elapsed: seconds that the run has taken, evaluations included.
        ended: why it ended before its length; empty where it did not.
        scalars: names of the last evaluation's single figures; arrays: its figures of several numbers.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    elapsed: float = 0.0
    ended: str = ""
    history: History = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    scalars: list[str] = field(default_factory=list)
    arrays: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._columns: list[str] = []
        self._text = bytearray(_line(self._columns))
        for row in self.history:
            self._note(row)

    def advance(self, batches: int, updated: bool) -> None:
        """Counts one batch; after `batches` of them the next epoch begins."""
        self.batch += 1
        self.step += updated
        if self.batch >= batches:
            self.epoch, self.batch = self.epoch + 1, 0

    def add_row(self, row: dict[str, float]) -> None:
        """Appends a row of history, from which on sums count anew."""
        self.history.append(row)
        self._note(row)
        self.sums, self.seconds = {}, 0.0

    def _note(self, row: Mapping[str, float]) -> None:
        """Keeps a row as text: its values, behind the names of its columns where these are others."""
        if list(row) != self._columns:
            self._columns = list(row)
            self._text += _line(self._columns)
        self._text += _line(list(row.values()))

    def state(self) -> dict[str, Any]:
        """As plain values and a tensor: the history's text, which made anew would cost more at every save."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "history": torch.frombuffer(self._text, dtype=torch.uint8).clone()}

    @classmethod
    def of(cls, state: Mapping[str, Any], batches: int) -> "Place":
        """The place of a `state`; an epoch of `batches` batches that it ended in is left."""
        values = dict(state)
        values["history"] = list(_rows(values["history"]))
        place = cls(**values)
        if place.batch >= batches:
            place.epoch, place.batch = place.epoch + 1, 0
        return place


def _line(values: list[Any]) -> bytes:
    return f"{json.dumps(values)}\n".encode()


def _rows(text: Tensor | str) -> Iterator[dict[str, float]]:
    """The rows of a saved history; one that is no tensor has the names in every row."""
    lines = text if isinstance(text, str) else text.numpy().tobytes().decode()
    columns: list[str] = []
    for values in map(json.loads, lines.splitlines()):
        if isinstance(values, dict):
            yield values
        elif all(isinstance(value, str) for value in values):
            columns = values
        else:
            yield dict(zip(columns, values, strict=True))


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
            exact = torch.float32 if now.device.type == "mps" else torch.float64  # Apple GPUs lack float64
            self._total = torch.tensor(start, device=now.device, dtype=exact)
            self._bad = torch.full_like(now, -1)
            self._count = int(self._before.get("_count", 0))
        self._total += now
        self._bad = torch.where((self._bad < 0) & ~now.isfinite(), float(step), self._bad)
        self._last = now
        self._count += 1

    def last(self) -> dict[str, float]:
        """The values of the last batch."""
        return dict(zip(self.names, self._last.tolist(), strict=True)) if self._last is not None else {}

    @property
    def count(self) -> int:
        """Batches counted in."""
        return self._count if self._total is not None else int(self._before.get("_count", 0))

    def sums(self, all_reduce: AllReduce) -> dict[str, float]:
        """What any number of processes needs to go on counting: the mean of their sums."""
        if self._total is None:
            return dict(self._before)
        mean = all_reduce(self._total, "mean").tolist()
        return dict(zip(self.names, mean, strict=True)) | {"_count": float(self._count)}

    def means(self, all_reduce: AllReduce) -> dict[str, float]:
        """Means over the batches, and over the processes."""
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
