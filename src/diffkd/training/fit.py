"""A recipe run to its end: the teacher made where there is none, then the student trained."""

from contextlib import ExitStack
from threading import RLock

from lightning.fabric import Fabric

from diffkd.data.base import data_kept
from diffkd.maths.randomness import cpu_threads
from diffkd.models.weights import load_weights
from diffkd.recipe.schema import Recipe
from diffkd.runs.console import Reporter
from diffkd.runs.folder import RunFolder
from diffkd.runs.places import check_folder, check_identity, note_use
from diffkd.training.checkpoint import keep_last
from diffkd.training.devices import in_one_line, launch, make_fabric, on_first
from diffkd.training.evaluation import Witness
from diffkd.training.ranks import ending_together
from diffkd.training.teacher import make_teacher
from diffkd.training.trainer import Trainer

# Random generators and the number of threads are the process's: two threads would draw from each other's.
_ONE_RUN = RLock()


def fit(recipe: Recipe, reporter: Reporter | None = None, witness: Witness | None = None) -> RunFolder:
    """Runs a recipe: makes its teacher if the recipe says how, then trains the student.

    Of several threads one run goes on at a time.

    Args:
        recipe: the run.
        reporter: says what happens.
        witness: of the student's last evaluation.

    Raises:
        UserError: the recipe cannot be run, and nothing is written; or the run had to stop.
        InterruptedRunError: the run was asked to stop, and has saved its place.
    """
    reporter = reporter or Reporter(progress=recipe.trainer.progress)
    fabric = make_fabric(recipe)
    with _ONE_RUN, ending_together(fabric), in_one_line(recipe):
        launch(fabric, reporter.note)
        reporter.active = reporter.active and fabric.is_global_zero
        if recipe.trainer.devices == "auto" and fabric.world_size > 1:
            reporter.note(f"devices: all {fabric.world_size} that are here; trainer.devices=1 takes one")
        with cpu_threads(recipe.trainer.threads), data_kept():
            return _fit(recipe, fabric, reporter, witness)


def _fit(recipe: Recipe, fabric: Fabric, reporter: Reporter, witness: Witness | None = None) -> RunFolder:
    # The whole run is built before its teacher is trained: a mistake shows at once.
    trainer = Trainer(recipe, fabric, reporter)
    trainer.witness = witness if fabric.world_size == 1 else None  # of several each sees a part
    with ExitStack() as held:
        for loader in (trainer.train_loader, trainer.test_loader):
            held.callback(loader.close)
        on_first(fabric, lambda: _take(trainer, held))
        for name, wanted in recipe.every_teacher.items():
            if wanted.train is not None and name in trainer.parts.teachers:
                _load_made(name, wanted.model, trainer, fabric, reporter)
        was_finished = trainer.folder.finished
        folder = trainer.run()
        if recipe.trainer.keep == "last" and not was_finished:
            on_first(fabric, lambda: keep_last(folder))
        return folder


def _load_made(name: str, model: str, trainer: Trainer, fabric: Fabric, reporter: Reporter) -> None:
    """Makes a teacher where there is none yet, and loads it."""
    parts = trainer.parts
    made = make_teacher(name, parts, fabric, reporter, lambda wanted, said: _fit(wanted, fabric, said))
    side = parts.teachers[name]
    side.notes.append(load_weights(side.model, made.student_file, name=model).note)
    side.weights = str(made.student_file.absolute())
    on_first(fabric, lambda: note_use(made.path, trainer.folder.path))


def _take(trainer: Trainer, held: ExitStack) -> None:
    """Keeps the run's folder for this process, and looks again whether it may be written to."""
    folder = trainer.folder
    damage = folder.damage(history=True) if folder.finished else None
    if not folder.finished or damage is not None:
        held.enter_context(folder.lock())
    check_folder(folder, trainer.recipe)
    check_identity(folder, trainer.parts.identity)
    if damage is not None and folder.list_checkpoints():
        trainer.reporter.warn(f"{damage}; the end of the run is written again")
        folder.reopen()
