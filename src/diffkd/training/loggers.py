"""Where the figures of a run go besides its folder: TensorBoard, Weights & Biases, MLflow."""

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.fabric.loggers.tensorboard import TensorBoardLogger

from diffkd.errors import UserError, first_line
from diffkd.recipe.schema import Recipe
from diffkd.runs.console import Reporter
from diffkd.runs.disk import read_json
from diffkd.runs.folder import RunFolder

PROJECT = "diffkd"


class Logger(ABC):
    """One place for figures.

    Args:
        folder: of the run.
        recipe: of the run.
        known: what the place called this run when it began; None for a new run.
    """

    package: ClassVar[str | None] = None

    def __init__(self, folder: Path, recipe: Recipe, known: str | None) -> None:
        self.name: str | None = None

    @abstractmethod
    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Takes figures of an optimizer step."""

    @abstractmethod
    def end(self) -> None:
        """The run is finished."""


class TensorBoard(Logger):
    """Event files in the run folder."""

    def __init__(self, folder: Path, recipe: Recipe, known: str | None) -> None:
        super().__init__(folder, recipe, known)
        self.writer = TensorBoardLogger(folder, name="", version="")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Writes events."""
        self.writer.log_metrics(dict(figures), step)

    def end(self) -> None:
        """Closes the file."""
        self.writer.finalize("success")


class Wandb(Logger):
    """Weights & Biases; `WANDB_MODE=offline` keeps its files in the run folder, for `wandb sync`."""

    package = "wandb"

    def __init__(self, folder: Path, recipe: Recipe, known: str | None) -> None:
        super().__init__(folder, recipe, known)
        import wandb

        self.run = wandb.init(
            project=PROJECT,
            name=f"{recipe.name}/{folder.name}",
            dir=str(folder),
            config=recipe.model_dump(mode="json"),
            id=known,
            resume="allow" if known else None,
            reinit="create_new",
            settings=wandb.Settings(silent=True),
        )
        self.name = str(self.run.id)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Hands them over; its own process sends them."""
        self.run.log(dict(figures), step=step)

    def end(self) -> None:
        """Waits until all is sent."""
        self.run.finish()


class Mlflow(Logger):
    """MLflow, at `MLFLOW_TRACKING_URI`; a file or database there needs no server."""

    package = "mlflow"

    def __init__(self, folder: Path, recipe: Recipe, known: str | None) -> None:
        super().__init__(folder, recipe, known)
        from mlflow import MlflowClient

        self.client = MlflowClient()
        if known is None:
            experiment = self.client.get_experiment_by_name(PROJECT)
            number = experiment.experiment_id if experiment else self.client.create_experiment(PROJECT)
            made = self.client.create_run(number, run_name=f"{recipe.name}/{folder.name}")
            known = made.info.run_id
            self.client.log_dict(known, recipe.model_dump(mode="json"), "recipe.json")
        self.name = known

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Sends them at once."""
        for key, value in figures.items():
            self.client.log_metric(str(self.name), key, float(value), step=step)

    def end(self) -> None:
        """Marks the run as finished."""
        self.client.set_terminated(str(self.name))


KINDS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}


def check_loggers(names: Sequence[str]) -> None:
    """Raises UserError where the client of a place is not installed."""
    for name in names:
        package = KINDS[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"trainer.loggers: {name} is not installed: pip install '{PROJECT}[{name}]'")


class Loggers:
    """All places that a recipe names. One that fails while the run goes on is left out, and that is said.

    Args:
        folder: of the run; a run that goes on is found again by what is kept there.
        recipe: of the run.
        reporter: is told of failures.

    Raises:
        UserError: a place cannot be reached at the start.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, reporter: Reporter) -> None:
        self.reporter = reporter
        place = folder.path / "loggers.json"
        known = read_json(place) if place.is_file() else {}
        self.open: dict[str, Logger] = {}
        for name in dict.fromkeys(recipe.trainer.loggers):
            try:
                self.open[name] = KINDS[name](folder.path, recipe, known.get(name))
            except Exception as error:  # of somebody else's client
                raise UserError(f"trainer.loggers: {name}: {first_line(error)}") from error
        names = {name: logger.name for name, logger in self.open.items() if logger.name is not None}
        if names:
            place.write_text(json.dumps({**known, **names}) + "\n", encoding="utf-8")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Hands figures of an optimizer step to all."""
        self._each(lambda logger: logger.log(figures, step))

    def end(self) -> None:
        """The run is finished."""
        self._each(lambda logger: logger.end())

    def _each(self, act: Any) -> None:
        for name, logger in list(self.open.items()):
            try:
                act(logger)
            except Exception as error:  # of somebody else's client: no reason to lose a run
                del self.open[name]
                self.reporter.warn(f"logger {name} failed, and gets nothing more: {first_line(error)}")
