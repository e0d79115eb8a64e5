"""The commands as Python functions, and what they leave behind as an object."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffkd.data.base import data_kept
from diffkd.errors import UserError
from diffkd.recipe.schema import load
from diffkd.report.compare import Wanted
from diffkd.report.compare import compare as run_all
from diffkd.report.evaluation import LastEvaluation, SplitName, evaluation_folder, measure, write_evaluation
from diffkd.report.finish import finish
from diffkd.report.run_page import PAGE
from diffkd.runs.console import Reporter
from diffkd.runs.disk import read_json
from diffkd.runs.folder import History, RunFolder
from diffkd.training.control import fit_with_control
from diffkd.use.export import ExportOptions, Format, export
from diffkd.use.predict import Predicted, predict
from diffkd.use.student import Student, load_student

if TYPE_CHECKING:
    from diffkd.use.visualize import Shown

Pictures = str | Path | Sequence[str | Path]
OnEpoch = Callable[["Run", Mapping[str, float]], None]


class Run:
    """A run folder.

    Args:
        folder: where it is.
        trust: runs the code that the folder names, where its student is somebody's own.

    >>> Run("runs/digits/diffkd-seed0").folder.name
    'diffkd-seed0'
    """

    def __init__(self, folder: str | Path, *, trust: bool = False) -> None:
        self.folder, self.trust = Path(folder), trust

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def summary(self) -> dict[str, Any]:
        """All figures of the finished run, as in `summary.json`.

        Raises:
            UserError: this is no run folder, or the run has not finished.
        """
        return RunFolder(self.folder).read_summary()

    @property
    def metrics(self) -> dict[str, float]:
        """The student's figures after the last epoch, 0 to 1."""
        last: dict[str, float] = self.summary["last"]
        return last

    @property
    def history(self) -> History:
        """One row per evaluation, as in `metrics.csv`."""
        return RunFolder(self.folder).read_history()

    @property
    def student(self) -> Student:
        """The trained student, ready to answer."""
        return load_student(self.folder, trust=self.trust)

    @property
    def best_student(self) -> Student:
        """The student of the best epoch, chosen as `summary["chosen_on"]` says."""
        return load_student(self.folder, trust=self.trust, which="best")

    @property
    def page(self) -> Path:
        """The run's page: curves, where the student errs, what to do next."""
        return self.folder / PAGE

    def evaluate(
        self,
        output: str | Path | None = None,
        *,
        split: SplitName = "test",
        which: Literal["last", "best"] = "last",
        **overrides: Any,
    ) -> dict[str, float]:
        """The student's figures on its test data, or on other data, 0 to 1; as `diffkd evaluate`.

        Args:
            output: the folder for where it errs; None is `evaluation/` in the run folder.
            split: of the data: "val" is what was held out for choosing.
            which: of the run's students.
            overrides: of the data: `data={"root": "photos"}`.
        """
        folder = RunFolder(self.folder)
        found = measure(folder, list(words(overrides)), trust=self.trust, which=which, split=split)
        write_evaluation(found, Path(output) if output else evaluation_folder(folder, found))
        return found.scalars

    def export(
        self, to: Format = "onnx", say: Callable[[str], Any] = lambda line: None, **options: Any
    ) -> Path:
        """Writes the student for another runtime, as `diffkd export` does; gives the file.

        Args:
            to: the format.
            say: is told in lines what was written and how it was checked; `print` shows them.
            options: as of `diffkd.use.export.ExportOptions`: `verify="full"`, `quantize="int8"`.

        Raises:
            UserError: it cannot be exported so, or its answers or figures differ.
        """
        wanted = ExportOptions(to=to, trust=self.trust, **options)
        return export(str(self.folder), wanted, say)

    def predict(self, pictures: Pictures, output: str | None = None, **options: Any) -> Predicted:
        """The student's answers for files, folders or patterns, as `diffkd predict` writes them.

        Args:
            pictures: one or several.
            output: the folder to write to; None is `predictions/` in the run folder.
            options: `top`, `threshold` and `which`, as of `diffkd.use.predict.predict`.
        """
        return predict(str(self.folder), _listed(pictures), output, trust=self.trust, **options)

    def visualize(
        self, pictures: Pictures, output: str | None = None, *, which: Literal["last", "best"] = "last"
    ) -> "Shown":
        """The denoising of files, folders or patterns, as `diffkd visualize` draws it.

        Args:
            pictures: one or several.
            output: the folder to write to; None is `denoising/` in the run folder.
            which: of the run's students.
        """
        from diffkd.use.visualize import visualize

        return visualize(str(self.folder), _listed(pictures), output, which=which, trust=self.trust)


def _listed(pictures: Pictures) -> list[str]:
    return [str(p) for p in ([pictures] if isinstance(pictures, str | Path) else pictures)]


def distill(recipe: str, on_epoch: OnEpoch | None = None, **overrides: Any) -> Run:
    """Distils a recipe's teacher into its student, as `diffkd distill` does.

    Args:
        recipe: a built-in name, or a YAML file.
        on_epoch: is called after each evaluation with the run and its new row of figures.
        overrides: of the recipe: `seed=1`, `control=True`,
            `trainer={"epochs": 5}`, `**{"data.root": "photos"}`.

    Raises:
        UserError: the recipe cannot be run.
    """
    wanted = load(recipe, list(words(overrides)))
    if wanted.method and wanted.teacher is None:
        raise UserError(f"recipe '{recipe}' has no teacher; set teacher=..., or use diffkd.train")
    run = Run(wanted.run_folder(), trust=True)  # its code has just run
    reporter = Reporter(progress=wanted.trainer.progress)
    if on_epoch is not None:
        reporter.on_row = lambda row: on_epoch(run, row)
    last = LastEvaluation()
    with data_kept():
        finish(fit_with_control(wanted, reporter, last), last, quiet=True)
    return run


def train(recipe: str, on_epoch: OnEpoch | None = None, **overrides: Any) -> Run:
    """Trains a recipe's student alone, as `diffkd train` does; arguments as for `distill`."""
    return distill(recipe, on_epoch, **overrides, method="none", teacher=None)


class Comparison:
    """The folder of a comparison.

    Args:
        folder: where it is.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"Comparison({str(self.folder)!r})"

    @property
    def figures(self) -> dict[str, Any]:
        """All figures, as in `comparison.json`; scores are shares, differences paired by seed."""
        return read_json(self.folder / "comparison.json")

    @property
    def table(self) -> str:
        """The table in Markdown."""
        return (self.folder / "table.md").read_text(encoding="utf-8")

    @property
    def page(self) -> Path:
        """The report."""
        return self.folder / "report.html"

    @property
    def runs(self) -> list[Run]:
        """All its runs, by the names of their folders."""
        return [Run(place.parent, trust=True) for place in sorted(self.folder.glob("*/summary.json"))]


def compare(
    recipe: str,
    methods: Sequence[str] = ("none", "kd", "diffkd"),
    seeds: int | Sequence[int] = 3,
    jobs: int = 1,
    output: str | Path | None = None,
    **overrides: Any,
) -> Comparison:
    """Trains a recipe's student by several methods alike, as `diffkd compare` does.

    Args:
        recipe: a built-in name, or a YAML file.
        methods: `none`, names, several joined by `+`.
        seeds: how many, or which.
        jobs: runs side by side.
        output: folder of runs and report; None is a place under `runs/`.
        overrides: for all runs, as for `distill`.

    Raises:
        UserError: a method is unknown or cannot serve, or the recipe has no teacher.
    """
    # a comma tells seeds from their number, and one that is said twice counts once
    chosen = str(seeds) if isinstance(seeds, int) else ",".join(map(str, [*seeds, *seeds[-1:]]))
    own = [f"methods={','.join(methods)}", f"seeds={chosen}", f"jobs={jobs}"]
    own += [f"output={output}"] if output is not None else []
    return Comparison(run_all(Wanted.parse(recipe, [*own, *words(overrides)])))


def words(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Overrides as the words of a command line.

    >>> list(words({"seed": 1, "trainer": {"epochs": 5}, "method": "kd"}))
    ['seed=1', 'trainer.epochs=5', 'method=kd']
    """
    for key, value in overrides.items():
        if isinstance(value, Mapping) and value:
            yield from words(value, f"{prefix}{key}.")
        elif isinstance(value, str | Path):
            yield f"{prefix}{key}={value}"
        else:
            yield f"{prefix}{key}={json.dumps(value)}"
