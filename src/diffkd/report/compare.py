"""Runs methods side by side, all trained alike, and reports what came out."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from diffkd.assembly import assemble, check_outputs
from diffkd.data.base import data_kept
from diffkd.errors import UserError, first_line
from diffkd.maths.randomness import seed_everything
from diffkd.recipe.schema import MethodRecipe, Recipe, load
from diffkd.report.comparison import FinishedRun, compare_runs, markdown, rich_table, to_csv
from diffkd.report.examples import example_sections
from diffkd.report.page import page
from diffkd.report.running import Carry, PlannedRun, carry_out
from diffkd.report.similarity import Similarity, similarity
from diffkd.report.summary import NARROW, percent
from diffkd.report.tuning import Length, Search, Tuned, trial_recipe
from diffkd.runs.disk import saying_where, write_atomically
from diffkd.runs.folder import RunFolder
from diffkd.runs.places import check_folder, check_identity
from diffkd.training.devices import is_first

_TUNING = ("tune", "tune_epochs", "tune_steps", "tune_fraction")
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
        tune: how each method's weight and options are chosen first; None takes them as they are.
    """

    recipe: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    jobs: int
    output: str | None
    overrides: tuple[str, ...]
    tune: Length | None = None

    @classmethod
    def parse(cls, recipe: str, words: Sequence[str]) -> "Wanted":
        """From the words of a command line.

        Raises:
            UserError: `methods`, `seeds`, `jobs` or a word on tuning cannot be understood.
        """
        own = {"methods": "none,kd,dist,diffkd", "seeds": "3", "jobs": "1", "output": ""}
        own |= dict.fromkeys(_TUNING, "")
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
            _tuning(own),
        )


@data_kept()
def compare(wanted: Wanted) -> Path:
    """Finds or makes every run, prints the table, writes the report; gives the report's folder.

    Where it is wanted, each method's weight and options are chosen first; then no run looks at the test data
    before all are chosen.

    Raises:
        UserError: a method is unknown or cannot serve, the recipe has no teacher, or a run folder holds
            another run; then nothing was run.
        InterruptedRunError: asked to stop; the same command goes on.
    """
    names = [name for label in wanted.methods for name in label.split("+") if name != "none"]
    base = load(wanted.recipe, wanted.overrides, methods=names)
    if base.teacher is None:
        raise UserError(
            f"recipe '{wanted.recipe}' has no teacher: there is nothing to compare; set teacher=..."
        )
    output = Path(wanted.output or Path("runs") / "compare" / base.name)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    tuned = {} if wanted.tune is None else tune(base, wanted, wanted.tune, output, console)
    runs = list(plan(base, wanted, output, tuned))
    for run in runs:
        check_folder(run.folder, run.recipe)
    notes = check_methods(runs)
    missing = [run for run in runs if not run.folder.finished]
    if len(missing) < len(runs) and is_first():
        console.print(f"{len(runs) - len(missing)} of {len(runs)} runs are there already")
    carry_out([partial(_work, run, console) for run in _counted(missing)], wanted.jobs, output)
    if not is_first():  # the runs were everyone's; the report is the first process's
        return output
    notes += [wanted.tune.told(base)] if wanted.tune else []
    told = {label: found.as_dict() for label, found in tuned.items()}
    comparison = compare_runs(base.name, _finished(runs, notes), notes, told)
    sections = example_sections([(run.method, run.folder) for run in runs], _teacher(runs))
    write_report(comparison, output, sections)
    screen = Console(highlight=False, markup=False, width=None if console.is_terminal else 150)
    screen.print(rich_table(comparison, narrow=screen.width < NARROW))
    console.print(f"report: {output / 'report.html'}")
    return output


def methods_of(base: Recipe, label: str) -> dict[str, MethodRecipe]:
    """The methods that a label joins, as the recipe has them."""
    names = [] if label == "none" else label.split("+")
    return {name: base.method.get(name, MethodRecipe()) for name in names}


def tune(base: Recipe, wanted: Wanted, length: Length, output: Path, console: Console) -> dict[str, Tuned]:
    """What equally many trials of each method choose, by label; `none` has nothing to choose.

    Raises:
        UserError: a method is unknown or cannot serve, or the folder holds other trials; nothing was run.
        InterruptedRunError: asked to stop; the same command goes on.
    """
    common = trial_recipe(base, length, max(wanted.seeds) + 1)
    searches = [
        Search(
            label,
            common.model_copy(update={"method": methods_of(base, label)}),
            output / "tuning" / _UNFIT.sub("_", label),
            length,
        )
        for label in wanted.methods
    ]
    check_methods([search.planned(0, {}) for search in searches])
    for search in searches:
        search.begin()

    def tell(line: str) -> None:
        if is_first():
            console.print(line)

    carry_out([partial(search.work, tell=tell) for search in searches], wanted.jobs, output)
    found = {search.label: search.chosen() for search in searches if search.space}
    for label, chosen in found.items():
        tell(f"{label}: chosen {chosen.shown or 'as it is'}")
    return found


def plan(base: Recipe, wanted: Wanted, output: Path, tuned: Mapping[str, Tuned]) -> Iterator[PlannedRun]:
    """Every run of the comparison, seed by seed, so that a part of it is a fair comparison already.

    Args:
        base: the recipe.
        wanted: methods and seeds.
        output: folder of the runs.
        tuned: what trials have chosen, by label.
    """
    for seed in wanted.seeds:
        for label in wanted.methods:
            methods = tuned[label].methods if label in tuned else methods_of(base, label)
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


def _counted(runs: Sequence[PlannedRun]) -> Iterator[PlannedRun]:
    for number, run in enumerate(runs, 1):
        yield replace(run, count=f"({number}/{len(runs)})")


def _work(run: PlannedRun, console: Console, carry: Carry) -> None:
    carry(run)
    if is_first():
        _tell(run, console)


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
        found = similarity(run.folder, teacher)
        if found and run.recipe.teachers:
            line = "features are compared with the first teacher's; there were several"
            notes[:] = dict.fromkeys([*notes, line])
        return found
    except Exception as error:  # the runs are whole: whatever stands in its way, the report is written
        first = first_line(error)
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


def _tuning(words: Mapping[str, str]) -> Length | None:
    """How to tune; None where nobody wants that."""
    given = {key: words[key] for key in _TUNING if words[key]}
    if not given:
        return None
    if "tune" not in given:
        first = next(iter(given))
        raise UserError(
            f"{first}={given[first]} is about trials; add tune=20, say, for so many of each method"
        )
    counts = {key: _count(key, text) for key, text in given.items() if key != "tune_fraction"}
    fraction = None
    if "tune_fraction" in given:
        try:
            fraction = float(given["tune_fraction"])
        except ValueError:
            fraction = math.nan
        if not 0 < fraction < 1:
            raise UserError(f"tune_fraction={given['tune_fraction']}: needs a share between 0 and 1")
    return Length(counts["tune"], counts.get("tune_epochs"), counts.get("tune_steps"), fraction)


def _count(key: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"{key}={text}: needs a whole number of at least 1")
    return int(text)
