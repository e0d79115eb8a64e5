"""A bar at the terminal for what takes a while before a run begins."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from torch import distributed

T = TypeVar("T")
_shown: ContextVar[bool] = ContextVar("_shown", default=True)


@contextmanager
def bars_shown(shown: bool) -> Iterator[None]:
    """Within, bars are shown or not, as the person wants."""
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


def watched(found: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The same, with a bar while it is gone through: of the first process, where that has a terminal.

    >>> list(watched(range(3), 3, "counting"))
    [0, 1, 2]
    """
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    if not (_shown.get() and first and total and sys.stderr.isatty()):
        yield from found
        return
    console = Console(stderr=True, highlight=False)
    yield from track(found, what, total, console=console, transient=True)
