"""Runs methods side by side, all trained alike, and reports what came out."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from rich.console import Console

from diffkd.assembly import assemble, check_outputs
from diffkd.data.base import data_kept
from diffkd.errors import UserError
from diffkd.maths.randomness import seed_everything
from diffkd.recipe.schema import MethodRecipe, Recipe, dump, load
from diffkd.report.comparison import FinishedRun, compare_runs, markdown, rich_table, to_csv
from diffkd.report.examples import example_sections
from diffkd.report.page import page
from diffkd.report.similarity import Similarity, similarity
from diffkd.report.summary import finish, percent
from diffkd.runs.console import Reporter
from diffkd.runs.disk import saying_where, write_atomically
from diffkd.runs.folder import RunFolder
from diffkd.runs.places import check_folder, check_identity
from diffkd.training.devices import is_first
from diffkd.training.fit import fit
from diffkd.training.interrupt import InterruptedRunError, StopRequest

_UNFIT = re.compile(r"[^\w+.-]+")  # for a folder's name


@dataclass(frozen=True)
class Wanted:
    """What is to be compared.

    Attributes:
        recipe: name or file.
        methods: `none`, names, or several joined by `+`.
        seeds: of the runs of each method.
        jobs: runs side by side.
        output: folder of the runs and the report; None is a place under `runs/`.
        overrides: of the recipe, for all runs.
    """

    recipe: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    jobs: int
    output: str | None
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, recipe: str, words: Sequence[str]) -> "Wanted":
        """From the words of a command line.

        Raises:
            UserError: `methods`, `seeds` or `jobs` cannot be understood.
        """
        own = {"methods": "none,kd,dist,diffkd", "seeds": "3", "jobs": "1", "output": ""}
        others = []
        for word in words:
            key, _, value = word.partition("=")
            if key in own:
                own[key] = value
            elif key == "method" or key == "seed":
                raise UserError(f"compare runs several: write {key}s=... instead of {word}")
            else:
                others.append(word)
        methods = tuple(dict.fromkeys(name.strip() for name in own["methods"].split(",") if name.strip()))
        if not methods:
            raise UserError("methods: name at least one, such as methods=none,kd,diffkd")
        return cls(
            recipe,
            methods,
            _seeds(own["seeds"]),
            _count("jobs", own["jobs"]),
            own["output"] or None,
            tuple(others),
        )


@dataclass(frozen=True)
class PlannedRun:
    """One run to be found or made."""

    method: str
    recipe: Recipe
    folder: RunFolder

    @property
    def label(self) -> str:
        """What the user sees."""
        return f"{self.method}, seed {self.recipe.seed}"


@data_kept()
def compare(wanted: Wanted) -> None:
    """Finds or makes every run, prints the table, writes the report.

    Raises:
        UserError: a method is unknown or cannot serve, the recipe has no teacher, or a run folder holds
            another run; then nothing was run.
        InterruptedRunError: asked to stop; the same command goes on.
    """
    names = [name for label in wanted.methods for name in label.split("+") if name != "none"]
    base = load(wanted.recipe, wanted.overrides, methods=names)
    output = Path(wanted.output or Path("runs") / "compare" / base.name)
    runs = list(plan(base, wanted, output))
    for run in runs:
        check_folder(run.folder, run.recipe)
    notes = check_methods(runs)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    missing = [run for run in runs if not run.folder.finished]
    if len(missing) < len(runs) and is_first():
        console.print(f"{len(runs) - len(missing)} of {len(runs)} runs are there already")
    if wanted.jobs == 1:
        _in_turn(missing, console)
    else:
        _side_by_side(missing, wanted.jobs, output, console)
    if not is_first():  # the runs were everyone's; the report is the first process's
        return
    comparison = compare_runs(base.name, _finished(runs, notes), notes)
    sections = example_sections([(run.method, run.folder) for run in runs], _teacher(runs))
    write_report(comparison, output, sections)
    Console(highlight=False, markup=False, width=None if console.is_terminal else 150).print(
        rich_table(comparison)
    )
    console.print(f"report: {output / 'report.html'}")


def plan(base: Recipe, wanted: Wanted, output: Path) -> Iterator[PlannedRun]:
    """Every run of the comparison, seed by seed, so that a part of it is a fair comparison already.

    Raises:
        UserError: the recipe has no teacher.
    """
    if base.teacher is None:
        raise UserError(
            f"recipe '{wanted.recipe}' has no teacher: there is nothing to compare; set teacher=..."
        )
    for seed in wanted.seeds:
        for label in wanted.methods:
            names = [] if label == "none" else label.split("+")
            methods = {name: base.method.get(name, MethodRecipe()) for name in names}
            place = output / f"{_UNFIT.sub('_', label)}-seed{seed}"
            update = {"method": methods, "seed": seed, "output": str(place), "resume": True}
            yield PlannedRun(label, base.model_copy(update=update), RunFolder(place))


def check_methods(runs: Sequence[PlannedRun]) -> list[str]:
    """Builds one run of every method, trains nothing, and collects what they have to say.

    Raises:
        UserError: a method is unknown, or cannot serve the task or the models.
    """
    notes: dict[str, None] = {}
    for label, run in {run.method: run for run in reversed(runs)}.items():
        try:
            seed_everything(run.recipe.seed)
            parts = assemble(run.recipe, with_teacher=bool(run.recipe.method))
            identity = parts.identity
            for other in (other for other in runs if other.method == label):
                check_identity(other.folder, identity)
            sample = parts.sample(2)
            check_outputs(parts, sample)
            notes |= dict.fromkeys([*parts.data.notes, *parts.distiller(sample)[1]])
        except UserError as error:
            raise UserError(f"methods: '{label}': {error}") from error
    return list(notes)


def write_report(comparison: dict[str, Any], output: Path, sections: str = "") -> None:
    """`report.html` (with further sections as HTML), `table.md`, `table.csv` and `comparison.json`.

    Raises:
        UserError: the folder is not writable.
    """
    files = {
        "report.html": page(comparison, sections),
        "table.md": markdown(comparison),
        "table.csv": to_csv(comparison),
        "comparison.json": json.dumps(comparison, indent=2) + "\n",
    }
    with saying_where(output):
        output.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomically(output / name, lambda place, text=text: place.write_text(text, encoding="utf-8"))  # type: ignore[misc]


def _in_turn(runs: Sequence[PlannedRun], console: Console) -> None:
    """One after the other, in this process."""
    told: set[str] = set()
    for number, run in enumerate(runs, 1):
        what = f"{run.label} ({number}/{len(runs)})"
        reporter = Reporter(progress=run.recipe.trainer.progress, quiet=True, what=what, told=told)
        try:
            fit(run.recipe, reporter)
        except InterruptedRunError as error:
            line = f"stopped in {run.label}; saved; the same command goes on"
            raise InterruptedRunError(line, error.signal) from error
        finish(run.folder, quiet=True)
        if is_first():
            _tell(run, console)


def _side_by_side(runs: Sequence[PlannedRun], jobs: int, output: Path, console: Console) -> None:
    """Several at once, each in a process of its own and, where there are several, on a device of its own."""
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    children: list[subprocess.Popen[str]] = []
    stopped = threading.Event()

    def work(run: PlannedRun) -> None:
        slot = slots.get()
        try:
            if not stopped.is_set():
                _run_apart(run, slot, output, children)
                _tell(run, console)
        except BaseException:
            stopped.set()
            raise
        finally:
            slots.put(slot)

    with StopRequest() as stop, ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(work, run) for run in runs}
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


def _run_apart(run: PlannedRun, slot: int, output: Path, children: list[subprocess.Popen[str]]) -> None:
    """One run as a command of its own."""
    with saying_where(output):
        place = output / "recipes" / run.folder.path.name / f"{run.recipe.name.replace('/', '-')}.yaml"
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
        raise UserError(f"{run.label}: {last}")


def device_of(slot: int, count: int, visible: str | None) -> dict[str, str]:
    """What a child's environment says of its device: one of those that this process sees, in turn.

    >>> device_of(3, 2, "6,7"), device_of(1, 2, None), device_of(1, 1, "6")
    ({'CUDA_VISIBLE_DEVICES': '7'}, {'CUDA_VISIBLE_DEVICES': '1'}, {})
    """
    if count < 2:
        return {}
    known = visible.split(",") if visible else [str(i) for i in range(count)]
    return {"CUDA_VISIBLE_DEVICES": known[slot % count].strip()}


def _tell(run: PlannedRun, console: Console) -> None:
    summary = run.folder.read_summary()
    score = percent(summary["last"][summary["metric"]])
    console.print(f"{run.label}: {summary['metric_label']} {score}, {summary['seconds']:.0f} s")


def _teacher(runs: Sequence[PlannedRun]) -> str | None:
    """The weights of the teacher of all of them."""
    summaries = (run.folder.read_summary() for run in runs)
    return next((s["teacher"]["weights"] for s in summaries if s["teacher"]), None)


def _finished(runs: Sequence[PlannedRun], notes: list[str]) -> list[FinishedRun]:
    """What the run folders say; features that cannot be compared are a note."""
    summaries, teacher = [run.folder.read_summary() for run in runs], _teacher(runs)
    return [
        FinishedRun(
            run.method,
            run.recipe.seed,
            summary,
            run.folder.read_history(),
            _similarity(run, teacher, notes),
        )
        for run, summary in zip(runs, summaries, strict=True)
    ]


def _similarity(run: PlannedRun, teacher: str | None, notes: list[str]) -> Similarity:
    try:
        return similarity(run.folder, teacher)
    except Exception as error:  # the runs are whole: whatever stands in its way, the report is written
        first = str(error).partition("\n")[0] or type(error).__name__
        notes[:] = dict.fromkeys([*notes, f"features are not compared: {first}"])
        return {}


def _seeds(text: str) -> tuple[int, ...]:
    """`3` is seeds 0, 1 and 2; `0,7` are those."""
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UserError(f"seeds={text}: needs a number of seeds, or seeds such as 0,1,2") from None
    if "," not in text:
        return tuple(range(_count("seeds", text)))
    if min(numbers) < 0:
        raise UserError(f"seeds={text}: seeds are 0 or more")
    return numbers


def _count(key: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"{key}={text}: needs a whole number of at least 1")
    return int(text)
