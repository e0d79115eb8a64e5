"""Boxes of a split, whatever format they came in, and what is wrong with them."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffkd.errors import UserError
from diffkd.pictures.options import quoted

_SLACK = 1.5  # pixels by which a box may leave its picture unnoticed: some formats count from 1


@dataclass(frozen=True)
class Annotated:
    """Picture files and their boxes, as a few arrays: loader processes would copy objects page by page.

    Attributes:
        folder: where the paths begin.
        paths: `(N,)` bytes, of the pictures.
        starts: `(N + 1,)` int64: boxes `starts[i]` to `starts[i + 1]` are those of picture i.
        boxes: `(M, 4)` float32: left, top, right, bottom, in pixels, or in shares of the sides where
            `relative`.
        labels: `(M,)` int64 from 0; ignore: `(M,)` bool, crowds and difficult objects; area: `(M,)`
            float32 of the object, NaN where the box's counts.
        sizes: `(N, 2)` int64 `(H, W)` that the annotations say, 0 where they say none.
        classes: names in the order of the labels.
        notes: what was found and left out, in lines.
    """

    folder: Path
    paths: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    area: np.ndarray
    sizes: np.ndarray
    classes: tuple[str, ...]
    relative: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def place(self, index: int) -> Path:
        """The picture's file."""
        return self.folder / os.fsdecode(bytes(self.paths[index]))

    def part(self, places: np.ndarray) -> "Annotated":
        """The pictures at some places `(n,)`."""
        counts = np.diff(self.starts)[places]
        spans = [np.arange(self.starts[i], self.starts[i + 1], dtype=np.int64) for i in places]
        rows = np.concatenate([np.zeros(0, np.int64), *spans])
        return replace(
            self,
            paths=self.paths[places],
            starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            ignore=self.ignore[rows],
            area=self.area[rows],
            sizes=self.sizes[places],
            notes=(),
        )

    def joined(self, other: "Annotated", folder: Path) -> "Annotated":
        """These pictures and another's of the same classes, both beneath a folder."""
        paths = [
            os.fsencode(part.place(i).relative_to(folder)) for part in (self, other) for i in range(len(part))
        ]
        both: dict[str, Any] = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("boxes", "labels", "ignore", "area", "sizes")
        }
        starts = np.concatenate([self.starts, other.starts[1:] + self.starts[-1]])
        notes = (*self.notes, *other.notes)
        return replace(self, folder=folder, paths=np.array(paths), starts=starts, notes=notes, **both)

    def relabelled(self, classes: Sequence[str], where: str) -> "Annotated":
        """The same boxes with labels by another order of classes.

        Raises:
            UserError: a class that has boxes is not among them; `where` says whose boxes these are.
        """
        number = {name: i for i, name in enumerate(classes)}
        used = [self.classes[k] for k in np.unique(self.labels)]
        unknown = [name for name in used if name not in number]
        if unknown:
            raise UserError(
                f"the classes of {where} differ from those to train on: it has also {quoted(unknown)}"
            )
        order = np.array([number.get(name, -1) for name in self.classes], np.int64)
        return replace(self, labels=order[self.labels], classes=tuple(classes))


@dataclass
class Collected:
    """Collects a split's pictures and boxes, counting what cannot be used.

    Args:
        source: what errors and notes call the annotations.
        folder: where the pictures lie.
        relative: boxes are in shares of the picture's sides.
    """

    source: str
    folder: Path
    relative: bool = False
    paths: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    flaws: dict[str, list[str]] = field(default_factory=dict)

    def add(self, path: str, size: tuple[int, int], rows: Iterable[Sequence[float]]) -> None:
        """One picture.

        Args:
            path: of its file, relative to the folder.
            size: `(H, W)`; zeros where it is not said.
            rows: left, top, right, bottom, label, whether it is ignored, area (NaN: the box's).
        """
        found = np.array(list(rows), np.float64).reshape(-1, 7)
        kept = self._checked(path, size, found)
        self.paths.append(path)
        self.sizes.append(size)
        self.counts.append(len(kept))
        self.rows.append(kept)

    def _checked(self, path: str, size: tuple[int, int], rows: np.ndarray) -> np.ndarray:
        """The boxes that can be used, within their picture."""
        height, width = (1.0, 1.0) if self.relative else size
        corners = rows[:, :4]
        known: Any = np.isfinite(corners).all(1)
        self._flaw(path, "not a number", ~known)
        corners = np.where(known[:, None], corners, 0.0)
        solid: Any = (corners[:, 2:] > corners[:, :2]).all(1)
        self._flaw(path, "without area", known & ~solid)
        inside: Any = np.ones(len(rows), bool)
        if height and width:
            high = np.array([width, height, width, height], np.float64)
            clipped = corners.clip(0, high)
            slack = _SLACK / 100 if self.relative else _SLACK
            self._flaw(path, "cut", solid & (np.abs(clipped - corners) > slack).any(1))
            inside = (clipped[:, 2:] > clipped[:, :2]).all(1)
            self._flaw(path, "outside", solid & ~inside)
            corners = clipped
        keep: Any = known & solid & inside
        return np.concatenate([corners[keep], rows[keep, 4:]], 1)

    def _flaw(self, path: str, kind: str, where: np.ndarray) -> None:
        self.flaws.setdefault(kind, []).extend([path] * int(where.sum()))

    def finish(self, classes: Sequence[str], notes: Sequence[str] = ()) -> Annotated:
        """All of them.

        Raises:
            UserError: there are no pictures, or most boxes leave theirs.
        """
        if not self.paths:
            raise UserError(f"{self.source} names no pictures")
        rows = np.concatenate(self.rows)
        self._check_format(len(rows))
        return Annotated(
            folder=self.folder,
            paths=np.array([os.fsencode(path) for path in self.paths], dtype=np.bytes_),
            starts=np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64),
            boxes=rows[:, :4].astype(np.float32),
            labels=rows[:, 4].astype(np.int64),
            ignore=rows[:, 5] > 0,
            area=rows[:, 6].astype(np.float32),
            sizes=np.array(self.sizes, np.int64).reshape(-1, 2),
            classes=tuple(classes),
            relative=self.relative,
            notes=(*self._account(len(rows)), *notes, *_same_names(classes, self.source)),
        )

    def _check_format(self, kept: int) -> None:
        spoilt = len(self.flaws.get("cut", ())) + len(self.flaws.get("outside", ()))
        turned = len(self.flaws.get("without area", ()))
        total = kept + sum(len(self.flaws.get(kind, ())) for kind in ("without area", "outside"))
        if kept and not self.relative and max(rows[:, :4].max(initial=0) for rows in self.rows) <= 1:
            raise UserError(f"{self.source}: no box leaves the first pixel: are these shares of the sides?")
        if total and (spoilt > 0.5 * total or turned > 0.5 * total):
            what = f"{spoilt} leave their picture" if spoilt > turned else f"{turned} end before they begin"
            raise UserError(
                f"{self.source}: of {total} boxes {what}: are they in another format (corners where width "
                "and height belong, or the other way round)?"
            )

    def _account(self, kept: int) -> list[str]:
        again = len(self.paths) - len(set(self.paths))
        bare = sum(count == 0 for count in self.counts)
        said = f"{self.source}: {len(self.paths)} pictures, {kept} boxes"
        lines = [said + (f", {bare} pictures without any (negatives)" if bare else "")]
        lines += [f"{self.source}: {again} pictures are listed more than once"] * bool(again)
        for kind, words in (
            ("without area", "without area left out"),
            ("not a number", "that are not numbers left out"),
            ("outside", "outside of their picture left out"),
            ("cut", "cut at the border of their picture"),
        ):
            names = self.flaws.get(kind, [])
            if names:
                lines.append(f"{self.source}: {len(names)} boxes {words}, the first in '{names[0]}'")
        return lines


def _same_names(classes: Sequence[str], source: str) -> Iterator[str]:
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        yield f"warning: {source}: several classes are called {quoted(twice)}"


def existing(folder: Path) -> set[str]:
    """Paths of all files beneath a folder, relative to it."""
    found: set[str] = set()
    for where, inner, files in os.walk(folder, followlinks=True):
        inner[:] = [name for name in inner if name[0] != "."]
        start = "" if where == str(folder) else Path(where).relative_to(folder).as_posix() + "/"
        found.update(start + name for name in files)
    return found


def within(name: str, there: set[str]) -> str | None:
    """Where a file that an annotation names lies, of those that are there; None if it does not.

    A path that leads out of the folder, or into another machine's, counts by its last part.

    >>> within("../../etc/a.jpg", {"a.jpg"}), within("sub/a.jpg", {"sub/a.jpg", "a.jpg"})
    ('a.jpg', 'sub/a.jpg')
    """
    name = name.replace("\\", "/")
    last = name.rpartition("/")[2]
    return next((candidate for candidate in (name, last) if candidate in there), None)


def check_absent(absent: Sequence[str], total: int, source: str, folder: Path) -> None:
    """Refuses annotations whose pictures are not there.

    Raises:
        UserError: some are not; most of them, and it is another data set.
    """
    if not absent:
        return
    if len(absent) > total / 2:
        raise UserError(
            f"{source}: {len(absent)} of {total} pictures are not in '{folder}', such as '{absent[0]}': "
            "are these the annotations of another data set?"
        )
    raise UserError(
        f"{source}: {len(absent)} of {total} pictures are not in '{folder}': {quoted(list(absent))}; "
        "add them, or take them out of the annotations"
    )
