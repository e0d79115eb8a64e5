"""Signals as a wish that a loop fulfils when its state is whole."""

import signal
import threading
from types import FrameType
from typing import Any


class InterruptedRunError(Exception):
    """The run was asked to stop and has saved its place.

    Attributes:
        signal: the signal that asked.
    """

    def __init__(self, line: str, signal: int) -> None:
        super().__init__(line)
        self.signal = signal


class StopRequest:
    """Turns a request to stop into a wish that the loop fulfils at the end of its step.

    SIGTERM, Ctrl-C, SIGUSR1 (sent by job managers before the end of their time) and SIGHUP (a closed
    terminal) ask alike. An ignored SIGHUP (`nohup`) stays ignored; outside the main thread, where
    Python handles no signals, none is taken.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows lacks two of them
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                continue
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # asked twice: at once
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
