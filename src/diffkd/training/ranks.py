"""Several processes of one run end together: an error is said once, whichever of them met it."""

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from subprocess import Popen, TimeoutExpired
from typing import Any

import torch
from lightning.fabric import Fabric
from torch._C._distributed_c10d import TCPStore

from diffkd.errors import UserError
from diffkd.training.devices import is_alone
from diffkd.training.interrupt import InterruptedRunError

LOOK = 0.5  # seconds between two looks at the others
SILENCE = 30.0  # seconds without a sign of life after which a process counts as gone
MEETING = 600.0  # seconds that the first machine waits for the others at the start
_GONE = "another process of this run has ended (killed, or out of memory); the last checkpoint is whole"
_TORN = ("gloo", "nccl", "connection", "socket", "broken pipe", "tcpstore", "processgroup", "peer")

_children: list["Popen[bytes]"] = []
_runs = 0


@contextmanager
def ending_together(fabric: Fabric) -> Iterator[None]:
    """Makes an error in one process the end of all.

    The process that meets an error first says it; the others, which may wait for it in a collective
    that cannot be interrupted, end without a word and with the same status. A process that is gone
    without a word (killed) is noticed by the others. Nothing happens where there is one process.
    """
    count = getattr(fabric.strategy, "num_processes", 1) * getattr(fabric.strategy, "num_nodes", 1)
    if count <= 1:
        yield
        return
    watch = _Watch(fabric)
    watch.start()
    try:
        yield
    except InterruptedRunError:
        raise
    except BaseException as error:
        watch.over.set()
        words = watch.last_words(error)
        if fabric.global_rank != 0 and isinstance(words, SystemExit):
            leave(words.code)  # type: ignore[arg-type]
        if words is error:
            raise
        raise words from error
    finally:
        watch.over.set()


class _Watch(threading.Thread):
    """Looks after the other processes, beside the run.

    Args:
        fabric: launched after this thread has started.
    """

    def __init__(self, fabric: Fabric) -> None:
        global _runs
        super().__init__(daemon=True, name="diffkd-watch")
        _runs += 1  # every process counts the same runs, so that the runs' keys do not meet
        self.fabric, self.prefix = fabric, f"diffkd/{_runs}"
        self.over = threading.Event()
        self._since = time.monotonic()
        self._store: Any = None
        self._signs: dict[int, tuple[int, float]] = {}

    # --- while all is well -----------------------------------------------------------------------

    def run(self) -> None:
        """Looks, until the run is over."""
        # Often until there is a connection: without one, the end of the first process shows late.
        while not self.over.wait(LOOK if self._store else LOOK / 10):
            try:
                self._look()
            except Exception:
                # Without the first process there is no store to ask; it may also just be at its end.
                if not self.over.wait(4 * LOOK):
                    self._leave(_GONE, 2)

    def _look(self) -> None:
        _adopt(self.fabric)
        if self._connected():
            if self._store.check([self._key("end")]):
                self._store.add(self._key("left"), 1)
                self._leave(None, json.loads(self._store.get(self._key("end")))["status"])
            self._check_signs()
        elif not torch.distributed.is_initialized() and time.monotonic() - self._since > MEETING:
            self._leave(f"not all processes of this run came within {MEETING / 60:g} minutes", 2)
        if any(child.poll() for child in _children):
            time.sleep(2 * LOOK)  # its last words may be under way
            if self._store is None or not self._store.check([self._key("end")]):
                self._leave(_GONE, 2)

    def _connected(self) -> bool:
        if self._store is None and torch.distributed.is_initialized():
            address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
            if address and port:  # a connection of its own: the run's may be busy waiting
                self._store = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=10))
        return self._store is not None

    def _check_signs(self) -> None:
        """Gives a sign of life, and looks for those of the others."""
        rank, now = self.fabric.global_rank, time.monotonic()
        self._store.add(self._key(f"alive/{rank}"), 1)
        for other in range(self.fabric.world_size):
            sign = self._store.add(self._key(f"alive/{other}"), 0)
            before, since = self._signs.get(other, (-1, now))
            self._signs[other] = (sign, now if sign != before else since)
            if sign and now - self._signs[other][1] > SILENCE:
                self._leave(_GONE, 2)

    def _leave(self, line: str | None, status: int) -> None:
        """Ends this process, wherever it waits."""
        if self.over.is_set():
            return
        if line is not None and not self._said_elsewhere():
            print(f"error: {line}", file=sys.stderr, flush=True)
            self._tell(status)
        leave(status)

    # --- when it ends in an error ----------------------------------------------------------------

    def last_words(self, error: BaseException) -> BaseException:
        """Tells the others that this process ends; what it is to raise, which says nothing if they did."""
        _adopt(self.fabric)
        torn = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _TORN)
        if torn:
            time.sleep(2 * LOOK)  # whoever tore the connection may have said why
            error = UserError(_GONE)
        status = 2 if isinstance(error, UserError | OSError) else 1
        if self._said_elsewhere():
            return SystemExit(status)
        if status == 2 and self.fabric.global_rank != 0:  # the command line speaks for the first process
            print(f"error: {error}", file=sys.stderr, flush=True)
            error = SystemExit(status)
        self._tell(status)
        with suppress(Exception):
            until = time.monotonic() + 10 * LOOK
            while time.monotonic() < until:  # the first process keeps the store: it leaves last
                gone = bool(_children) and all(child.poll() is not None for child in _children)
                if gone or self._store.add(self._key("left"), 0) >= self.fabric.world_size - 1:
                    break
                time.sleep(LOOK / 5)
        if not torch.distributed.is_initialized():  # they would look for this process for long
            for child in _children:
                child.kill()
        return error

    def _tell(self, status: int) -> None:
        """Has the others leave, too."""
        with suppress(Exception):
            self._store.set(self._key("end"), json.dumps({"status": status}))

    def _said_elsewhere(self) -> bool:
        """Whether another process was the first that had something to say, and lived to say it."""
        try:
            if not self._connected() or self._store.add(self._key("said"), 1) == 1:
                return False
            until = time.monotonic() + 4 * LOOK
            while not (told := self._store.check([self._key("end")])) and time.monotonic() < until:
                time.sleep(LOOK / 10)
            return bool(told)
        except Exception:
            return False

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}"


def is_one_of_several() -> bool:
    """Whether other processes belong to this run, also where they have not met yet."""
    return bool(_children) or not is_alone()


def leave(status: int) -> None:
    """Ends this process now, and with it those that it started, which may say their last words before.

    Python's own way out would take seconds, and may wait for processes that are gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    for loader in multiprocessing.active_children():
        loader.terminate()
    until = time.monotonic() + 4 * LOOK
    for child in _children:
        with suppress(TimeoutExpired):
            child.wait(max(until - time.monotonic(), 0))
        with suppress(OSError):
            child.kill()
    os._exit(status)


def _adopt(fabric: Fabric) -> None:
    """Takes over the processes that Fabric started, which it would kill without a word."""
    for process in getattr(getattr(fabric.strategy, "launcher", None), "procs", ()):
        if process not in _children:
            _children.append(process)
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]
