"""The commands as Python functions, and what they leave behind as an object."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffkd.errors import UserError
from diffkd.recipe.schema import load
from diffkd.runs.console import Reporter
from diffkd.runs.folder import History, RunFolder
from diffkd.training.control import fit_with_control
from diffkd.use.predict import Predicted, predict
from diffkd.use.student import Student, load_student

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

    def predict(self, pictures: str | Path | Sequence[str | Path], output: str | None = None) -> Predicted:
        """The student's answers for files, folders or patterns, as `diffkd predict` writes them."""
        words = [pictures] if isinstance(pictures, str | Path) else pictures
        return predict(str(self.folder), [str(word) for word in words], output, trust=self.trust)


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
    fit_with_control(wanted, reporter)
    return run


def train(recipe: str, on_epoch: OnEpoch | None = None, **overrides: Any) -> Run:
    """Trains a recipe's student alone, as `diffkd train` does; arguments as for `distill`."""
    return distill(recipe, on_epoch, **overrides, method="none", teacher=None)


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
