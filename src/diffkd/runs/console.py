"""What a run says to the terminal: notes, warnings, figures, and one progress bar."""

import sys
from collections.abc import Callable, Mapping

from rich.console import Console

from diffkd.errors import plain
from diffkd.runs.bar import ProgressBar


class Reporter:
    """Says things to the person at the terminal and to the run's log.

    The progress bar shows where standard error is a terminal, and in notebooks; elsewhere a line a minute
    stands for it.

    Args:
        active: False silences it altogether (processes other than the first).
        progress: False hides the bar, and the figures of each epoch.
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
        self._early: list[str] = []  # said before there was a log
        self.on_row: Callable[[Mapping[str, float]], None] | None = None
        self._progress, self._what = progress, what
        self._bar = progress and (sys.stderr.isatty() or self.console.is_jupyter)

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
        self._early.append(line)
        if self.log is not None:
            for early in self._early:
                self.log(early)
            self._early.clear()

    def record(self, line: str) -> None:
        """Writes a line to the log; the terminal sees it only where a bar does not stand for it."""
        if self.active and self.log is not None:
            self.log(line)

    def row(self, row: Mapping[str, float], line: str = "") -> None:
        """A row of figures is whole: writes it to the log, and tells whoever wants to know.

        Args:
            row: of the history.
            line: the same in few words, for the person at the terminal.
        """
        self.record(" ".join(f"{k}={v:.5g}" for k, v in row.items()))
        if line and self._progress and self.active:
            self.console.print(plain(f"{self._what} {line}".strip()), markup=False)
        if self.active and self.on_row is not None:
            self.on_row(row)

    def silent(self, what: str) -> "Reporter":
        """Another reporter that keeps its notes to its log, and whose bar begins with `what`."""
        other = Reporter(active=self.active, progress=self._progress, quiet=True, what=what, told=self.told)
        other.console = self.console
        return other

    def bar(self, total: int, done: int = 0, what: str = "") -> ProgressBar:
        """A progress bar of `total` steps, `done` of them already.

        Args:
            total: steps.
            done: of them, before.
            what: it is of, where that is not the run itself, of which the whole time is told.
        """
        console = self.console if self._bar and self.active else None
        say = self._progress_line if self._progress and self.active else None
        name = f"{self._what} {what}".strip()
        return ProgressBar(console, total, done, name, say, whole=not what)

    def _progress_line(self, line: str) -> None:
        told = line if line.startswith(self._what) else f"{self._what}: {line}"
        self.console.print(plain(told), markup=False)
        self.record(line)
