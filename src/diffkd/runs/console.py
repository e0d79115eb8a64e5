"""What a run says to the terminal: notes, warnings, and one progress bar."""

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from diffkd.errors import plain


class Reporter:
    """Says things to the person at the terminal and to the run's log.

    The progress bar shows only where standard error is a terminal.

    Args:
        active: False silences it altogether (processes other than the first).
        progress: False hides the bar.
        quiet: True says notes to the log alone; warnings are said all the same.
        what: what the bar begins with.
        told: warnings that were said before and are not said again.
    """

    def __init__(
        self,
        *,
        active: bool = True,
        progress: bool = True,
        quiet: bool = False,
        what: str = "",
        told: set[str] | None = None,
    ) -> None:
        self.active, self.quiet = active, quiet
        self.told = set() if told is None else told
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.log: Callable[[str], None] | None = None
        self.on_row: Callable[[Mapping[str, float]], None] | None = None
        self._bar, self._what = active and progress and sys.stderr.isatty(), f"{what} " if what else ""

    def note(self, line: str) -> None:
        """Says a line, and writes it to the log."""
        self._say(line, not self.quiet)

    def warn(self, line: str) -> None:
        """Says that something looks wrong, once."""
        self._say(f"warning: {line}", line not in self.told, "yellow")
        self.told.add(line)

    def _say(self, line: str, aloud: bool, style: str | None = None) -> None:
        if not self.active:
            return
        if aloud:
            self.console.print(plain(line), style=style, markup=False)
        if self.log is not None:
            self.log(line)

    def record(self, line: str) -> None:
        """Writes a line to the log; the terminal sees it only where a bar does not stand for it."""
        if self.active and self.log is not None:
            self.log(line)

    def row(self, row: Mapping[str, float]) -> None:
        """A row of figures is whole: writes it to the log, and tells whoever wants to know."""
        self.record(" ".join(f"{k}={v:.5g}" for k, v in row.items()))
        if self.active and self.on_row is not None:
            self.on_row(row)

    def silent(self, what: str) -> "Reporter":
        """Another reporter that keeps its notes to its log, and whose bar begins with `what`."""
        other = Reporter(active=self.active, quiet=True, what=what, told=self.told)
        other._bar = self._bar
        return other

    def bar(self, total: int, done: int = 0) -> "ProgressBar":
        """A progress bar of `total` steps, `done` of them already."""
        return ProgressBar(self.console if self._bar else None, total, done, self._what)


class ProgressBar:
    """Steps done, losses, images per second and the time left; nothing where there is no terminal."""

    def __init__(self, console: Console | None, total: int, done: int, what: str) -> None:
        self._progress: Progress | None = None
        self._done, self._total, self._what = done, total, what
        self._images, self._since = 0, time.perf_counter()
        if console is not None:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=console,
                transient=True,
            )
            self._task = self._progress.add_task(escape(what), total=total, completed=done, figures="")

    def __enter__(self) -> "ProgressBar":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def step(self, steps: int, images: int) -> None:
        """So many steps done, on so many images."""
        self._done += steps
        self._images += images

    def show(self, what: str, losses: Mapping[str, float]) -> None:
        """Brings the terminal up to date."""
        if self._progress is None:
            return
        now = time.perf_counter()
        rate = self._images / max(now - self._since, 1e-9)
        self._images, self._since = 0, now
        figures = "  ".join(f"{name} {value:.3f}" for name, value in _summed(losses).items())
        self._progress.update(
            self._task,
            completed=self._done,
            description=escape(f"{self._what}{what}"),
            figures=f"{rate:,.0f} img/s  {figures}",
        )


def _summed(losses: Mapping[str, float]) -> dict[str, float]:
    """Losses that a method has for each of its taps as one: a line has room for no more.

    >>> _summed({"loss": 3.0, "diffkd.layer4.kd": 1.0, "diffkd.output.kd": 2.0})
    {'loss': 3.0, 'diffkd.kd': 3.0}
    """
    sums: dict[str, float] = {}
    for name, value in losses.items():
        method, _, rest = name.partition(".")
        kind = rest.rpartition(".")[2]
        short = name if not rest else kind if method == "task" else f"{method}.{kind}"
        sums[short] = sums.get(short, 0.0) + value
    return sums
