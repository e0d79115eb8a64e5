"""Runs carried out one after the other in this process, or several at once in processes of their own."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch

from diffkd.errors import NotFiniteError, UserError
from diffkd.recipe.schema import Recipe, dump
from diffkd.report.evaluation import LastEvaluation
from diffkd.report.finish import finish
from diffkd.runs.console import Reporter
from diffkd.runs.disk import saying_where
from diffkd.runs.folder import RunFolder
from diffkd.training.fit import fit
from diffkd.training.interrupt import InterruptedRunError, StopRequest


@dataclass(frozen=True)
class PlannedRun:
    """One run to be found or made.

    Attributes:
        method: as the user wrote it.
        recipe: of the run, which goes on where it stopped.
        folder: where it is written.
        trial: which trial of its method it is, in words; such a run leaves no plots.
        count: which of all runs it is, in words.
    """

    method: str
    recipe: Recipe
    folder: RunFolder
    trial: str = ""
    count: str = ""

    @property
    def label(self) -> str:
        """What the user sees."""
        return f"{self.method}, {self.trial or f'seed {self.recipe.seed}'}"


Carry = Callable[[PlannedRun], None]
Work = Callable[[Carry], None]


def carry_out(works: Sequence[Work], jobs: int, output: Path) -> None:
    """Does every work; each is given a function that carries out one run.

    Args:
        works: independent of each other; the runs of one come one after the other.
        jobs: so many at once, each run in a process of its own and, where there are several, on a device
            of its own; 1 is one after the other, in this process.
        output: folder of all runs.

    Raises:
        UserError: a run cannot be finished.
        InterruptedRunError: asked to stop; the runs' places are saved.
    """
    if jobs > 1:
        return _side_by_side(works, jobs, output)
    told: set[str] = set()
    for work in works:
        work(lambda run: _here(run, told))
    return None


def _here(run: PlannedRun, told: set[str]) -> None:
    """In this process."""
    what = f"{run.label} {run.count}".rstrip()
    reporter = Reporter(progress=run.recipe.trainer.progress, quiet=True, what=what, told=told)
    last = LastEvaluation()
    try:
        fit(run.recipe, reporter, None if run.trial else last)
    except InterruptedRunError as error:
        line = f"stopped in {run.label}; saved; the same command goes on"
        raise InterruptedRunError(line, error.signal) from error
    if not run.trial:
        finish(run.folder, last, quiet=True)


def _side_by_side(works: Sequence[Work], jobs: int, output: Path) -> None:
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    children: list[subprocess.Popen[str]] = []
    stopped = threading.Event()

    def carry(run: PlannedRun) -> None:
        slot = slots.get()
        try:
            if stopped.is_set():
                raise InterruptedRunError("stopped; the same command goes on", 0)
            _apart(run, slot, output, children)
        finally:
            slots.put(slot)

    def work_on(work: Work) -> None:
        if stopped.is_set():
            return
        try:
            work(carry)
        except BaseException:
            stopped.set()
            raise

    with StopRequest() as stop, ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(work_on, work) for work in works}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if stop.signal is not None:
                    raise InterruptedRunError("stopped; the same command goes on", stop.signal)
        except BaseException:
            stopped.set()
            for child in list(children):  # those that have ended take no notice
                child.terminate()
            raise


def _apart(run: PlannedRun, slot: int, output: Path, children: list[subprocess.Popen[str]]) -> None:
    """As a command of its own."""
    with saying_where(output):
        place = output / "recipes" / run.folder.path.relative_to(output)
        place = place / f"{run.recipe.name.replace('/', '-')}.yaml"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(dump(run.recipe))
    words = [str(place), f"output={run.folder.path}", "resume=true", "trainer.progress=false", "trust=true"]
    child = subprocess.Popen(
        # -P: what lies in the current folder is not imported in the place of a library
        [sys.executable, "-P", "-m", "diffkd.cli", "distill", *words],
        env=os.environ
        | device_of(slot, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        | {"DIFFKD_PARENT": str(os.getpid())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    children.append(child)
    _, said = child.communicate()
    if child.returncode:
        last = (said.strip().splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
        raise (NotFiniteError if NotFiniteError.words in last else UserError)(f"{run.label}: {last}")


def device_of(slot: int, count: int, visible: str | None) -> dict[str, str]:
    """What a child's environment says of its device: one of those that this process sees, in turn.

    >>> device_of(3, 2, "6,7"), device_of(1, 2, None), device_of(1, 1, "6")
    ({'CUDA_VISIBLE_DEVICES': '7'}, {'CUDA_VISIBLE_DEVICES': '1'}, {})
    """
    if count < 2:
        return {}
    known = visible.split(",") if visible else [str(i) for i in range(count)]
    return {"CUDA_VISIBLE_DEVICES": known[slot % count].strip()}
