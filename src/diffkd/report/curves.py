"""The curves of one run as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diffkd.runs.disk import write_atomically
from diffkd.runs.folder import History

INK, FAINT = "#222222", "#dddddd"
COLOURS = ("#4053d3", "#e0722a", "#1f9d8a", "#b51d5f", "#8a63d2", "#7f7f00", "#00796b", "#555555")


def draw_curves(history: History, summary: dict[str, Any], place: Path) -> None:
    """Quality, losses and learning rate over the epochs, or over the steps of a run that counts in them."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    quality, losses, rate = figure.subplots(1, 3)
    axis = summary.get("axis", "epoch")
    places = [row[axis] for row in history]
    _draw_quality(quality, places, history, summary)
    _draw_losses(losses, places, history, summary)
    rate.plot(places, [row["lr"] for row in history], color=COLOURS[2])
    rate.set_title("learning rate", loc="left")
    for axes in (quality, losses, rate):
        _plain(axes, axis)
    write_atomically(place, lambda partial: figure.savefig(partial, format="png", dpi=110))


def _draw_quality(axes: Axes, places: Sequence[float], history: History, summary: dict[str, Any]) -> None:
    metric, best = summary["metric"], summary["best"]
    axes.plot(places, [100 * row[metric] for row in history], color=COLOURS[0], label="student")
    at = best[summary.get("axis", "epoch")]
    axes.plot(at, 100 * best[metric], "o", color=COLOURS[0], label=f"best {100 * best[metric]:.2f} %")
    if metric in (summary["teacher"] or {}):
        score = 100 * summary["teacher"][metric]
        axes.axhline(score, color=INK, linestyle=":", label=f"teacher {score:.2f} %")
    axes.set_title(f"{summary['metric_label']} on the test data, %", loc="left")
    _legend(axes, 1)


def _draw_losses(axes: Axes, places: Sequence[float], history: History, summary: dict[str, Any]) -> None:
    columns = dict.fromkeys(key for row in history for key in row)
    named = [key for key in columns if key.split(".")[0] in ("task", *summary["methods"])]
    looks = [(colour, line) for line in ("-", "--", ":", "-.") for colour in COLOURS]
    for (colour, line), name in zip(looks, [n for n in named if not n.endswith(".gamma")], strict=False):
        values = [row.get(name, float("nan")) for row in history]
        axes.plot(places, values, color=colour, linestyle=line, label=name)
    axes.set_yscale("log")
    axes.set_title("training losses", loc="left")
    _legend(axes, 2)


def _legend(axes: Axes, columns: int) -> None:
    """Names of the lines, beneath the axes: inside they would lie over some of them."""
    axes.legend(frameon=False, fontsize=7, ncols=columns, loc="upper left", bbox_to_anchor=(0, -0.16))


def _plain(axes: Axes, axis: str) -> None:
    axes.set_xlabel(axis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=FAINT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
