"""The table of teacher and student, and words for numbers."""

from typing import Any

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from diffkd.errors import plain

_LONG = 28  # characters of a model's name, above which it takes two lines
NARROW = 110  # characters of a terminal, below which tables are set for 80


def summary_table(
    summary: dict[str, Any], alone: dict[str, Any] | None = None, *, narrow: bool = False
) -> Table:
    """Teacher and student side by side: how good, how large, how fast.

    Args:
        summary: of the run.
        alone: of the run of the same student without a teacher.
        narrow: it is whole at 80 characters: models' names wrap.
    """
    label, turn = summary["metric_label"], "\n" if narrow else " "
    table = Table(
        title=plain(_title(summary)),
        caption=plain(_measured(summary)),
        box=SIMPLE_HEAD if narrow else HEAVY_HEAD,
        padding=(0, 1, 0, 0) if narrow else (0, 1),
    )
    table.add_column("", no_wrap=True)
    table.add_column("model", overflow="fold")
    for column in (
        f"{label}{turn}last",
        f"{label}{turn}best",
        "parameters",
        "MACs",
        "ms/image",
        "size",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    student, teacher, metric = summary["student"], summary["teacher"], summary["metric"]
    taught = {} if teacher is None else {"teacher": teacher, **summary.get("teachers", {})}
    for name, each in taught.items():
        score = percent(each[metric]) if metric in each else ""
        table.add_row(plain(name), _model(each["model"]), score, "", *_costs(each))
    for name, run in ((f"student{turn}alone", alone), ("student", summary)):
        if run is not None:
            axis = run.get("axis", "epoch")
            best = f"{percent(run['best'][metric])}{turn}({axis} {run['best'][axis]})"
            last = percent(run["last"][metric])
            table.add_row(name, _model(student["model"]), last, best, *_costs(student))
    return table


def _model(name: str) -> str:
    """A model's name; a long one on two lines, rather than broken within a word.

    >>> _model("torchvision/retinanet:timm/resnet18").splitlines()
    ['torchvision/retinanet:', 'timm/resnet18']
    """
    head, colon, rest = plain(name).partition(":")
    return f"{head}:\n{rest}" if colon and len(name) > _LONG else plain(name)


def _measured(summary: dict[str, Any]) -> str:
    threads = ", one thread" if summary["device"] == "cpu" else ""
    on = "validation" if summary.get("chosen_on") == "val" else "test"
    return f"best: chosen on the {on} data; ms/image: one picture at a time{threads}; {summary['machine']}"


def _title(summary: dict[str, Any]) -> str:
    title = (
        f"{summary['recipe']}, {' + '.join(summary['methods']) or 'no distillation'}, seed {summary['seed']}"
    )
    if summary["teacher"] is not None:
        ratio = summary["teacher"]["parameters"] / summary["student"]["parameters"]
        title += f": {_times(ratio)} parameters"
    return title


def _times(ratio: float) -> str:
    """How many times fewer the student has of something.

    >>> _times(15), _times(0.5)
    ('15.0 times fewer', '2.0 times more')
    """
    return f"{ratio:.1f} times fewer" if ratio >= 1 else f"{1 / max(ratio, 1e-9):.1f} times more"


def _costs(side: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{side['parameters']:,}",
        quantity(side["macs"]),
        f"{side['milliseconds']:.2f}",
        size(side["bytes"]),
    )


def percent(value: float) -> str:
    """A share as a percentage with two decimals.

    >>> percent(0.98765)
    '98.77 %'
    """
    return f"{100 * value:.2f} %"


def quantity(value: float) -> str:
    """A number with three digits and its SI prefix.

    >>> quantity(1_234_567)
    '1.23 M'
    """
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            digits = 0 if value >= 99.5 or prefix == "" else 1 if value >= 9.95 else 2
            return f"{value:.{digits}f} {prefix}".rstrip()
        value /= 1000
    raise AssertionError


def size(count: float) -> str:
    """A number of bytes.

    >>> size(512), size(5_390)
    ('512 B', '5.39 kB')
    """
    number = quantity(count)
    return f"{number} B" if number[-1].isdigit() else f"{number}B"


def text_of(table: Table, width: int = 120) -> str:
    """A table as plain text."""
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
