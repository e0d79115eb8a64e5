"""One line that says how far a run is: on a terminal it moves, in a log it comes once a minute."""

import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from diffkd.errors import plain

MINUTE = 60.0  # seconds between two lines of a log
_SURE = 10.0  # seconds of work after which the time that is left can be told
_RATE = 8  # times a second that the line is brought up to date
_CELL = 100  # characters of the line in a notebook
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class ProgressBar:
    """Steps done, the time left, images per second, losses.

    Args:
        console: of a terminal or a notebook, on which the line moves; None writes to `say` once a minute.
        total: steps of the whole.
        done: of them, before.
        what: what the line begins with.
        say: takes a line for the log; None is silent.
        whole: says how long the whole takes as soon as that can be told.
    """

    def __init__(
        self,
        console: Console | None,
        total: int,
        done: int = 0,
        what: str = "",
        say: Callable[[str], None] | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self._total, self._done, self._first, self._what = total, done, done, what
        self._say, self._whole = say, whole
        self._images, self._rate = 0, 0.0
        self._start = self._since = self._told = time.perf_counter()
        self._text, self._aside = "", ""
        self._figures: dict[str, float] = {}
        self._live: Live | _Cell | None = None
        if console is not None and console.is_jupyter:
            self._live = _Cell(lambda: self.line(_CELL))
        elif console is not None:
            self._live = Live(self, console=console, transient=True, refresh_per_second=_RATE)

    def __enter__(self) -> "ProgressBar":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, steps: int, images: int, what: str = "") -> None:
        """So many steps done, on so many images; and where that is, in words."""
        self._done += steps
        self._text = what or self._text
        self._images += images
        if isinstance(self._live, _Cell):
            self._live.refresh()

    def show(self, what: str, losses: Mapping[str, float]) -> None:
        """Brings the line up to date."""
        now = time.perf_counter()
        self._rate = self._images / max(now - self._since, 1e-9)
        self._images, self._since = 0, now
        self._text, self._aside, self._figures = what, "", summed(losses)
        self._tell(now)

    def aside(self, what: str) -> None:
        """Says what goes on between two steps: an evaluation, say; nothing, once that is over."""
        self._aside = what
        self._tell(time.perf_counter())

    def _tell(self, now: float) -> None:
        left = self.left(now)
        if isinstance(self._live, _Cell):
            self._live.refresh()
        if self._whole and left is not None and now - self._start >= _SURE:
            self._whole = False
            if self._say is not None and left >= MINUTE:
                self._say(f"about {span(left)} on this machine ({self._rate:,.0f} img/s)")
                self._told = now
        if self._live is None and self._say is not None and now - self._told >= MINUTE:
            self._told = now
            self._say(self.line(160, now).strip())

    def left(self, now: float) -> float | None:
        """Seconds left, by the pace so far; None where that is not known yet."""
        gone = self._done - self._first
        return (now - self._start) / gone * (self._total - self._done) if gone else None

    def line(self, width: int, now: float | None = None) -> str:
        """The line, whole in a width of `width` characters: place, share and time left come first."""
        left = self.left(time.perf_counter() if now is None else now)
        share = 100 * self._done / max(self._total, 1)
        tail = f"  {share:3.0f} %" + (f"  {span(left)} left" if left is not None else "")
        head = plain(" ".join(word for word in (self._what, self._text, self._aside) if word))
        room = max(width - len(tail), 8)
        head = head if len(head) <= room else f"…{head[len(head) - room + 1 :]}"
        line = head + tail
        for more in self._more(width):
            if len(line) + 2 + len(more) > width:
                break
            line += f"  {more}"
        return line

    def _more(self, width: int) -> Iterator[str]:
        """What follows as room allows."""
        if self._live is not None:
            size = 10 if width < 100 else 24
            full = round(size * self._done / max(self._total, 1))
            yield "━" * full + "╌" * (size - full)
        if self._rate:
            yield f"{self._rate:,.0f} img/s"
        yield from (f"{name} {value:.3f}" for name, value in self._figures.items())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now = time.perf_counter()
        spinner = _SPINNER[int(now * 10) % len(_SPINNER)]
        yield Text(f"{spinner} {self.line(options.max_width - 2, now)}", no_wrap=True, overflow="crop")


class _Cell:
    """The line in a notebook's output, brought up to date a few times a second; a terminal's needs a widget.

    Args:
        line: gives it.
    """

    def __init__(self, line: Callable[[], str]) -> None:
        self._line, self._shown = line, 0.0
        self._handle: Any = None

    def start(self) -> None:
        """Shows the line."""
        from IPython.display import display

        self._handle = display({"text/plain": self._line()}, raw=True, display_id=True)  # type: ignore[no-untyped-call]

    def refresh(self) -> None:
        """Shows the line as it is now, if that is due."""
        now = time.perf_counter()
        if self._handle is not None and now - self._shown >= 1 / _RATE:
            self._shown = now
            self._handle.update({"text/plain": self._line()}, raw=True)

    def stop(self) -> None:
        """Shows the line as it ended."""
        self._shown = 0.0
        self.refresh()


def span(seconds: float) -> str:
    """A time in words, with two digits at most.

    >>> span(5), span(90), span(3600 * 5.2), span(36 * 3600), span(20 * 86400)
    ('5 s', '1 min 30 s', '5 h 12 min', '36 h', '20 days')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 600:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours} h" if hours < 72 else f"{round(hours / 24)} days"


def summed(losses: Mapping[str, float]) -> dict[str, float]:
    """Losses that a method has for each of its taps as one: a line has room for no more.

    >>> summed({"loss": 3.0, "diffkd.layer4.kd": 1.0, "diffkd.output.kd": 2.0})
    {'loss': 3.0, 'diffkd.kd': 3.0}
    """
    sums: dict[str, float] = {}
    for name, value in losses.items():
        method, _, rest = name.partition(".")
        kind = rest.rpartition(".")[2]
        short = name if not rest else kind if method == "task" else f"{method}.{kind}"
        sums[short] = sums.get(short, 0.0) + value
    return sums
