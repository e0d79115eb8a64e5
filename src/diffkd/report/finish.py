"""What a finished run shows: curves, its page, the table of teacher and student."""

from typing import Any

from rich.console import Console

from diffkd.errors import plain
from diffkd.report.curves import draw_curves
from diffkd.report.evaluation import LastEvaluation
from diffkd.report.published import published_line
from diffkd.report.run_page import finish_page
from diffkd.report.summary import NARROW, summary_table
from diffkd.runs.disk import saying_where
from diffkd.runs.folder import RunFolder
from diffkd.training.control import control_hint, find_control
from diffkd.training.devices import is_first


def finish(folder: RunFolder, last: LastEvaluation | None = None, *, quiet: bool = False) -> None:
    """Draws the curves, writes the page and prints the table of a run that has just ended.

    Of several processes the first does.

    Args:
        folder: of the run.
        last: its last evaluation, where that was watched.
        quiet: prints nothing.
    """
    if not is_first():
        return
    summary = folder.read_summary()
    with saying_where(folder.path):
        draw_curves(folder.read_history(), summary, folder.path / "curves.png")
        written = finish_page(folder, last)
    if quiet:
        return
    console = Console(highlight=False, markup=False, width=None if Console().is_terminal else 120)
    control = find_control(folder)
    alone = control.read_summary() if control is not None else None
    console.print(summary_table(summary, alone, narrow=console.width < NARROW))
    hint = control_hint(folder) if alone is None else None
    if alone is not None:
        console.print(plain(_gain(summary, alone)), soft_wrap=True)
    elif hint is not None:
        console.print(plain(f"student alone, for comparison: {hint}"), soft_wrap=True)
    published = published_line(summary, alone)
    if published is not None:
        console.print(plain(published), soft_wrap=True)
    console.print(plain(f"page: {written}"), soft_wrap=True)
    console.print(plain(f"run folder: {folder.path}"), soft_wrap=True)


def _gain(summary: dict[str, Any], alone: dict[str, Any]) -> str:
    metric = summary["metric"]
    points = 100 * (summary["last"][metric] - alone["last"][metric])
    return f"gain over the student alone: {points:+.2f} points, one seed"
