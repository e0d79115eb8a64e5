"""SIGTERM and Ctrl-C as a wish that a loop fulfils when its state is whole."""

import signal
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
    """Turns SIGTERM and Ctrl-C into a wish that the loop fulfils at the end of its step."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # asked twice: at once
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
