"""Each method's weight and options, chosen by equally many trials on samples held out of the training data.

The test data are not used: a trial trains on what is left of the training data, and is judged on what was
held out. A method's trials are one study of Optuna, kept in a file that gains a line when a trial is done.
What is tried next follows from the seed and the trials before alone, so that a killed search goes on as if
nothing had happened, with the trial under way at its last checkpoint.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffkd.data.base import VAL_FRACTION
from diffkd.errors import NotFiniteError, UserError
from diffkd.maths.randomness import mix
from diffkd.methods.base import Range, method_class
from diffkd.recipe.schema import MethodRecipe, Recipe, dump, load
from diffkd.report.running import Carry, PlannedRun
from diffkd.runs.folder import RunFolder
from diffkd.runs.identity import difference
from diffkd.training.devices import is_first

# What a weight is multiplied with in the first trials; then Optuna chooses up to so far from it.
_LADDER, _FARTHEST = (1.0, 0.1, 10.0), 100.0
_WEIGHT_ALONE = 5  # trials of the weight, before the options are tried with it


@dataclass(frozen=True)
class Length:
    """How the trials are made.

    Attributes:
        trials: of each method.
        epochs, steps: of each trial; None for as long as the final runs.
        fraction: share of the training samples held out; None is `data.val_fraction`, or a tenth.
    """

    trials: int
    epochs: int | None = None
    steps: int | None = None
    fraction: float | None = None

    def share(self, base: Recipe) -> float:
        """Share of the training samples held out."""
        return self.fraction or base.data.val_fraction or VAL_FRACTION

    def told(self, base: Recipe) -> str:
        """How each method was tuned, in words."""
        short = f"{self.epochs} epochs" if self.epochs else f"{self.steps} steps" if self.steps else ""
        return (
            f"weights and options: each method's best of {self.trials} trials of "
            f"{short or 'the full length'}, with a seed of their own, judged on "
            f"{100 * self.share(base):g} % of the training samples, held out; the test data were not used"
        )


@dataclass(frozen=True)
class Tuned:
    """What the trials of a method have chosen.

    Attributes:
        methods: as a recipe has them.
        values: by `method.key`.
        trials: how many there were.
        score: of the best trial on the samples held out; first: of the first one, as published.
    """

    methods: dict[str, MethodRecipe]
    values: dict[str, Any]
    trials: int
    score: float
    first: float | None

    @property
    def shown(self) -> str:
        """The values in words."""
        return shown(self.values)

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        options = {key: value for key, value in self.values.items() if not key.endswith(".weight")}
        return {
            "values": self.values,
            "shown": self.shown,
            "options": shown(options),
            "trials": self.trials,
            "score": self.score,
            "first": self.first,
        }


def trial_recipe(base: Recipe, length: Length, seed: int) -> Recipe:
    """The recipe of all trials: on held-out samples, shorter if wanted.

    A schedule in epochs or steps shrinks with the run; a teacher that is made takes as long as without.

    Args:
        base: of the final runs.
        length: of the trials.
        seed: one that no final run has.

    Raises:
        UserError: a trial would be longer than the final runs, or is given in other units.
    """
    held = {"test_on": "val", "val_fraction": length.share(base)}
    update: dict[str, Any] = {"data": base.data.model_copy(update=held), "seed": seed, "resume": True}
    for unit in ("epochs", "steps"):
        short, full = getattr(length, unit), getattr(base.trainer, unit)
        if short is None:
            continue
        if full is None or short > full:
            has = f"{full} {unit}" if full else f"another unit than {unit}"
            raise UserError(f"tune_{unit}={short}: the final runs have {has}")
        update |= _shortened(base, unit, short, short / full)
    return base.model_copy(update=update)


def _shortened(base: Recipe, unit: str, length: int, share: float) -> dict[str, Any]:
    """Parts of a recipe whose run is a share as long; the teacher's training says what it took from them."""
    schedule: dict[str, Any] = {"warmup_epochs": base.schedule.warmup_epochs * share}
    if base.schedule.warmup_steps is not None:
        schedule["warmup_steps"] = max(round(base.schedule.warmup_steps * share), 1)
    if base.schedule.name == "step" and base.schedule.unit != "share":
        schedule["milestones"] = [place * share for place in base.schedule.milestones]
        schedule["every"] = None if base.schedule.every is None else base.schedule.every * share
    found: dict[str, Any] = {
        "trainer": base.trainer.model_copy(update={unit: length}),
        "schedule": base.schedule.model_copy(update=schedule),
    }
    teachers = base.every_teacher
    for name, teacher in teachers.items():
        if teacher.train is None:
            continue
        told = teacher.train if teacher.train.epochs or teacher.train.steps else base.trainer
        said = {"epochs": told.epochs, "steps": told.steps}
        said["schedule"] = teacher.train.schedule or base.schedule  # type: ignore[assignment]
        train = teacher.train.model_copy(update=said)
        teachers[name] = teacher.model_copy(update={"train": train})
    return {**found, "teacher": teachers.pop("teacher", None), "teachers": teachers}


class Search:
    """The trials of one method, or of several joined by `+`.

    Args:
        label: as the user wrote it.
        recipe: of the trials, with the method as it is without tuning.
        folder: of the trials.
        length: how many, how long.

    Raises:
        UserError: Optuna is not installed, or the folder holds trials of another recipe.
    """

    def __init__(self, label: str, recipe: Recipe, folder: Path, length: Length) -> None:
        self.label, self.recipe, self.folder, self.length = label, recipe, folder, length
        self.optuna = _optuna(length.trials)
        self.start, self.space = _space(recipe.method, self.optuna.distributions)
        self._check_recipe()
        self.trials: list[Any] = []
        if (folder / "study.log").is_file():
            self.trials = list(self._study().trials)[: length.trials]

    def planned(self, number: int, values: Mapping[str, Any]) -> PlannedRun:
        """The run of a trial."""
        place = self.folder / f"trial-{number:03}"
        update = {"method": self.methods(values), "output": str(place)}
        what = f"trial {number + 1} of {self.length.trials}"
        return PlannedRun(self.label, self.recipe.model_copy(update=update), RunFolder(place), what)

    def methods(self, values: Mapping[str, Any]) -> dict[str, MethodRecipe]:
        """The method's part of a recipe with some values, by `method.key`."""
        found = {}
        for name, told in self.recipe.method.items():
            own = {k.removeprefix(f"{name}."): v for k, v in values.items() if k.startswith(f"{name}.")}
            found[name] = MethodRecipe.model_validate(told.model_dump() | own)
        return found

    def next(self) -> tuple[int, dict[str, Any]] | None:
        """Number and values of the next trial; None where all are done, or there is nothing to choose."""
        number = len(self.trials)
        if number >= self.length.trials or not self.space:
            return None
        weights = {key: kind for key, kind in self.space.items() if key.endswith(".weight")}
        ladder = _LADDER if weights else _LADDER[:1]
        if number == 0:
            return number, dict(self.start)
        if number < len(ladder):
            return number, {key: _rounded(self.start[key] * ladder[number]) for key in weights}
        wanted = weights if weights and number < _WEIGHT_ALONE else self.space
        seed = mix(self.recipe.seed, number) % 2**32
        sampler = self.optuna.samplers.TPESampler(seed=seed, n_startup_trials=len(ladder))
        study = self.optuna.create_study(sampler=sampler, direction=self._direction)
        study.add_trials(self.trials)
        return number, {k: _rounded(v) for k, v in study.ask(dict(wanted)).params.items()}

    def work(self, carry: Carry, tell: Any) -> None:
        """Carries out the trials that are left; one whose losses become infinite counts as the worst.

        Args:
            carry: carries out a run.
            tell: is told a line after each trial.
        """
        while (found := self.next()) is not None:
            run = self.planned(*found)
            try:
                carry(run)
                summary = run.folder.read_summary()
                score, label = summary["last"][summary["metric"]], summary["metric_label"]
                told = f"{label} {100 * score:.2f} % on held-out samples"
            except NotFiniteError:
                score, told = None, "its losses did not stay finite"
            self._add(found[1], score)
            tell(f"{run.label}: {told} ({shown(found[1]) or 'as it is'})")

    def chosen(self) -> Tuned:
        """What the trials have chosen: the best of them, of equals the first.

        Raises:
            UserError: not one of them trained.
        """
        scored = [trial for trial in self.trials if trial.value is not None]
        if not scored:
            raise UserError(f"methods: '{self.label}': the losses of no trial stayed finite")
        sign = 1 if self._higher else -1
        best = max(scored, key=lambda trial: (sign * trial.value, -trial.number))
        values = dict(best.params)
        return Tuned(self.methods(values), values, len(self.trials), best.value, self.trials[0].value)

    @property
    def _higher(self) -> bool:
        from diffkd.tasks.base import task_class

        return task_class(self.recipe.task.name).higher_is_better

    @property
    def _direction(self) -> str:
        return "maximize" if self._higher else "minimize"

    def _add(self, values: Mapping[str, Any], score: float | None) -> None:
        """Notes a finished trial; its weights are not needed any more."""
        state = self.optuna.trial.TrialState
        trial = self.optuna.trial.create_trial(
            # a pruned trial counts as worse than all others
            state=state.PRUNED if score is None else state.COMPLETE,
            params=dict(values),
            distributions={key: self.space[key] for key in values},
            value=score,
        )
        trial.number = len(self.trials)
        if is_first():
            self._study().add_trial(trial)
            for name in ("checkpoints", "student"):
                shutil.rmtree(self.folder / f"trial-{trial.number:03}" / name, ignore_errors=True)
        self.trials.append(trial)

    def _study(self) -> Any:
        """The study in its file, without a last line that was not finished."""
        place = self.folder / "study.log"
        content = place.read_bytes() if place.is_file() else b""
        if content and not content.endswith(b"\n") and is_first():
            place.write_bytes(content[: content.rfind(b"\n") + 1])
        backend = self.optuna.storages.journal.JournalFileBackend(str(place))
        storage = self.optuna.storages.JournalStorage(backend)
        return self.optuna.create_study(
            study_name=self.label, storage=storage, direction=self._direction, load_if_exists=True
        )

    def _check_recipe(self) -> None:
        place = self.folder / "recipe.yaml"
        if place.is_file():
            differing = difference(load(str(place), trust=True), self.recipe)
            if differing is not None:
                raise UserError(
                    f"the trials in '{self.folder}' were made with another recipe: {differing}; "
                    "set output= for a new comparison"
                )

    def begin(self) -> None:
        """Makes the folder, and writes down what the trials have in common."""
        if is_first() and self.space:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "recipe.yaml").write_text(dump(self.recipe), encoding="utf-8")


def _space(methods: Mapping[str, MethodRecipe], kinds: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """Weights to start at, and by `method.key` between what to choose; options of the recipe stay."""
    start: dict[str, float] = {}
    space: dict[str, Any] = {}
    for name, told in methods.items():
        method = method_class(name)
        weight = method.usual_weight(told.options) if told.weight is None else told.weight
        if weight != "auto" and weight > 0:
            start[f"{name}.weight"] = float(weight)
            low, high = (_rounded(float(weight) * factor) for factor in (1 / _FARTHEST, _FARTHEST))
            space[f"{name}.weight"] = kinds.FloatDistribution(low, high, log=True)
        for wanted in method.search:
            if wanted.option in told.options:
                continue
            space[f"{name}.{wanted.option}"] = (
                kinds.FloatDistribution(wanted.low, wanted.high, log=True)
                if isinstance(wanted, Range)
                else kinds.CategoricalDistribution(wanted.values)
            )
    return start, space


def _rounded(value: Any) -> Any:
    """A number as tables show it: what is shown is what was used.

    >>> _rounded(0.123456), _rounded("robust")
    (0.123, 'robust')
    """
    return float(f"{value:.3g}") if isinstance(value, float) else value


def shown(values: Mapping[str, Any]) -> str:
    """Chosen values in words; the method's name is left out where there is one method.

    >>> shown({"kd.weight": 0.3, "kd.temperature": 2.0}), shown({"kd.weight": 0.3, "dist.weight": 1.0})
    ('weight 0.3, temperature 2', 'kd.weight 0.3, dist.weight 1')
    """
    names = {key.rpartition(".")[0] for key in values}
    said = {(key.rpartition(".")[2] if len(names) == 1 else key): value for key, value in values.items()}
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in said.items())


def _optuna(trials: int) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError(f"tune={trials} needs a library: pip install 'diffkd[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
