"""A recipe run to its end: the teacher made where there is none, then the student trained."""

import re
from contextlib import nullcontext

from filelock import FileLock
from lightning.fabric import Fabric

from diffkd.assembly import Parts
from diffkd.maths.randomness import cpu_threads
from diffkd.models.weights import load_weights
from diffkd.recipe.schema import Recipe, cache_key
from diffkd.runs.console import Reporter
from diffkd.runs.folder import RunFolder, saying_where
from diffkd.runs.places import cache_folder, check_cache
from diffkd.training.devices import make_fabric, on_first
from diffkd.training.interrupt import InterruptedRunError
from diffkd.training.trainer import Trainer


def fit(recipe: Recipe, reporter: Reporter | None = None) -> RunFolder:
    """Runs a recipe: makes its teacher if the recipe says how, then trains the student.

    Raises:
        UserError: the recipe cannot be run, and nothing is written; or the run had to stop.
        InterruptedRunError: the run was asked to stop, and has saved its place.
    """
    reporter = reporter or Reporter(progress=recipe.trainer.progress)
    fabric = make_fabric(recipe)
    fabric.launch()
    reporter.active = reporter.active and fabric.is_global_zero
    with cpu_threads(recipe.trainer.threads):
        return _fit(recipe, fabric, reporter)


def _fit(recipe: Recipe, fabric: Fabric, reporter: Reporter) -> RunFolder:
    # The whole run is built before its teacher is trained: a mistake shows at once.
    trainer = Trainer(recipe, fabric, reporter)
    if trainer.parts.teacher is not None and recipe.teacher is not None and recipe.teacher.train is not None:
        made = make_teacher(recipe, trainer.parts, fabric, reporter)
        loaded = load_weights(trainer.parts.teacher.model, made.student_file, name=recipe.teacher.model)
        trainer.parts.teacher.notes.append(loaded.note)
        trainer.parts.teacher.weights = str(made.student_file.absolute())
    return trainer.run()


def make_teacher(recipe: Recipe, parts: Parts, fabric: Fabric, reporter: Reporter) -> RunFolder:
    """The run that trained the recipe's teacher: found in the cache, or run now and kept there.

    Args:
        recipe: the student's run.
        parts: the run's, whose data and teacher's weights, as they were found, determine the teacher too.
        fabric: launched.
        reporter: says what happens.

    Raises:
        UserError: the cache folder cannot be used.
    """
    wanted = recipe.teacher_recipe()
    start = {"weights": parts.teacher.weights if parts.teacher else None}
    wanted = wanted.model_copy(update={"student": wanted.student.model_copy(update=start)})
    name = re.sub(r"[^\w.-]+", "-", wanted.student.model)
    place = cache_folder() / "teachers" / f"{name}-{cache_key(wanted)}-{parts.fingerprint}"
    wanted = wanted.model_copy(update={"output": str(place), "resume": True})
    folder = RunFolder(place)
    if fabric.broadcast(folder.finished):
        reporter.note(f"teacher: {wanted.student.model} from {place}")
        return folder
    on_first(fabric, lambda: check_cache(place))
    with saying_where(recipe.run_folder()):  # a place that cannot be written to shows before, too
        recipe.run_folder().mkdir(parents=True, exist_ok=True)
    reporter.note(f"teacher: training {wanted.student.model} once, kept in {place}")
    with FileLock(f"{place}.lock") if fabric.is_global_zero else nullcontext():
        if fabric.broadcast(folder.finished):  # by another run, while this one waited
            return folder
        try:
            return _fit(wanted, fabric, reporter.silent("teacher"))
        except InterruptedRunError as error:
            line = "stopped while the teacher was trained; saved; the same command goes on"
            raise InterruptedRunError(line, error.signal) from error
