"""Figures of each class, method beside method: intersection over union, average precision."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from numbers import Real
from statistics import mean
from typing import Any, Protocol

MOST_CLASSES = 30  # that are shown: those in which the methods differ most


class _Run(Protocol):
    @property
    def summary(self) -> Mapping[str, Any]: ...


def per_class(of: Mapping[str, Sequence[_Run]]) -> Iterator[dict[str, Any]]:
    """The figures that every run has for each class, as means over the seeds; nothing where there are none.

    Yields:
        `figure`, its name; `classes`, their names; `methods`, values by method, None for a class that has
        none; `shown`, indices of the classes that a table has room for.

    Args:
        of: finished runs by method.
    """
    runs = list(chain.from_iterable(of.values()))
    classes = list(runs[0].summary.get("class_names") or ())
    held = [run.summary.get("arrays") or {} for run in runs]
    for figure in held[0]:
        if not classes or not all(_fits(arrays.get(figure), len(classes)) for arrays in held):
            continue
        values = {
            name: [_mean(row) for row in zip(*(run.summary["arrays"][figure] for run in own), strict=True)]
            for name, own in of.items()
        }
        yield {"figure": figure, "classes": classes, "methods": values, "shown": _shown(values)}


def class_tables(tables: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    r"""Lines of Markdown, a table for each figure.

    >>> iou = {"figure": "iou", "classes": ["cat"], "methods": {"kd": [0.5]}, "shown": [0]}
    >>> print("\n".join(class_tables([iou])).strip())
    iou of each class, %:
    <BLANKLINE>
    | class | kd |
    | --- | ---: |
    | cat | 50.00 |
    """
    for table in tables:
        names, shown, count = list(table["methods"]), table["shown"], len(table["classes"])
        of = f"the {len(shown)} of {count} classes that differ most" if len(shown) < count else "each class"
        yield from ("", f"{table['figure']} of {of}, %:", "")
        yield "| " + " | ".join(["class", *map(_cell, names)]) + " |"
        yield "| --- |" + " ---: |" * len(names)
        for index in shown:
            values = [table["methods"][name][index] for name in names]
            cells = [_cell(table["classes"][index]), *("" if v is None else f"{100 * v:.2f}" for v in values)]
            yield "| " + " | ".join(cells) + " |"


def _fits(values: Any, count: int) -> bool:
    """Whether it is one number, or None, for each class."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(value is None or isinstance(value, Real) for value in values)
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _shown(values: Mapping[str, Sequence[float | None]]) -> list[int]:
    """Classes in their order; where they are too many, those in which the methods differ most."""
    columns = [[v for v in column if v is not None] for column in zip(*values.values(), strict=True)]
    known = [index for index, column in enumerate(columns) if column]
    spread = {index: max(columns[index]) - min(columns[index]) for index in known}
    return sorted(sorted(known, key=lambda index: -spread[index])[:MOST_CLASSES])


def _cell(text: object) -> str:
    """Text for a cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")
