"""What is kept of a student's answers, whatever the task."""

import csv
import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffkd.batch import Batch
from diffkd.data.base import Split
from diffkd.pictures.files import Pictures
from diffkd.report.faults.sheet import Row
from diffkd.runs.disk import cell, write_atomically
from diffkd.tasks.base import Figures

SHOWN = 24  # pictures of a sheet


class Account(ABC):
    """Looks at every batch of an evaluation, and says at its end where the student errs.

    Args:
        names: of the classes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    @abstractmethod
    def add(self, batch: Batch, output: Any) -> None:
        """Takes a loader's batch and the answers that `predict` gave for it."""

    @abstractmethod
    def tables(self, figures: Figures) -> dict[str, list[dict[str, Any]]]:
        """Tables by name, a mapping for each row; shares are 0 to 1, None where there is no such figure."""

    def scalars(self) -> dict[str, float]:
        """Further single figures."""
        return {}

    @abstractmethod
    def sheet(self) -> list["Worst"]:
        """The worst pictures, the worst first."""

    def draw(self, folder: Path, figures: Figures) -> None:  # noqa: B027
        """Writes further pictures and tables of its own."""


@dataclass(frozen=True)
class Worst:
    """A picture with a bad answer.

    Attributes:
        index: of the test sample.
        says: what is wrong with it, in a few words, and as plain values.
        images: `(3, H, W)` uint8 each: the picture, and what else is to be seen.
    """

    index: int
    says: str
    facts: Mapping[str, Any]
    images: tuple[Tensor, ...]

    @property
    def row(self) -> Row:
        """As a contact sheet shows it."""
        return Row(self.images, self.says)


class Keep:
    """The worst pictures so far, by how bad they are.

    >>> keep = Keep(2)
    >>> for index, badness in enumerate([0.1, 0.9, 0.5]):
    ...     keep.add(badness, index, lambda index=index: Worst(index, "", {}, ()))
    >>> [worst.index for worst in keep.worst()]
    [1, 2]
    """

    def __init__(self, most: int = SHOWN) -> None:
        self.most = most
        self._heap: list[tuple[float, int, Worst]] = []

    def add(self, badness: float, index: int, make: Callable[[], Worst]) -> None:
        """Takes a picture, made only where it is among the worst; of equals the first stays."""
        if len(self._heap) < self.most:
            heapq.heappush(self._heap, (badness, -index, make()))
        elif (badness, -index) > self._heap[0][:2]:
            heapq.heapreplace(self._heap, (badness, -index, make()))

    def worst(self) -> list[Worst]:
        """The worst first."""
        return [kept for *_, kept in sorted(self._heap, key=lambda kept: (-kept[0], -kept[1]))]


def name_of(split: Split, index: int) -> str | None:
    """What a picture of a split is called; None where it has no name."""
    if not isinstance(split, Pictures):
        return None
    try:
        return split.picture(index)[0]
    except (IndexError, KeyError):
        return None


def write_table(place: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV; what is None stays empty."""

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["class"], lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)

    write_atomically(place, write)


def ratio(part: float, whole: float) -> float | None:
    """A share; None of nothing.

    >>> ratio(1, 4), ratio(0, 0)
    (0.25, None)
    """
    return part / whole if whole else None


def harmonic(one: float | None, other: float | None) -> float | None:
    """F1 of precision and recall; 0 where one is none though the other is not.

    >>> harmonic(0.5, 1.0), harmonic(None, None)
    (0.6666666666666666, None)
    """
    if one is None and other is None:
        return None
    total = (one or 0.0) + (other or 0.0)
    return 2 * (one or 0.0) * (other or 0.0) / total if total else 0.0
