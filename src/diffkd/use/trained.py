"""A finished run built again: its models with their weights, its methods as they ended."""

from typing import Any

from diffkd.assembly import Parts, assemble
from diffkd.distiller import Distiller
from diffkd.errors import UserError
from diffkd.maths.randomness import seed_everything
from diffkd.recipe.schema import Recipe, load
from diffkd.runs.folder import RunFolder, load_checkpoint, step_of
from diffkd.use.student import read_config, student_folder


def as_trained(recipe: Recipe, folder: RunFolder, teacher_weights: str | None, which: str = "last") -> Recipe:
    """A run's recipe with the weights that it ended with, and its (first) teacher's as found or made."""
    weights = str(folder.path if which == "last" else student_folder(folder.path, which))
    found: dict[str, Any] = {
        "student": recipe.student.model_copy(update={"weights": weights, "weights_by_order": False})
    }
    found |= {"teachers": {}, "taps": recipe.taps_of()}
    if recipe.teacher is not None:
        found["teacher"] = recipe.teacher.model_copy(update={"weights": teacher_weights, "train": None})
    return recipe.model_copy(update=found)


def load_methods(distiller: Distiller, folder: RunFolder, which: str = "last") -> None:
    """Gives a distiller's methods what they had learned when the run ended, or in its best epoch.

    A distiller of one teacher takes of a run with several what was learned from the first.

    Raises:
        UserError: the run keeps no such checkpoint, or one of another version's methods.
    """
    kept = folder.list_checkpoints()
    if which == "best":
        step = int(read_config(student_folder(folder.path, which))["step"])
        kept = [path for path in kept if step_of(path) == step]
    if not kept:
        way = "; trainer.keep=all keeps every checkpoint" if which == "best" else ""
        raise UserError(
            f"'{folder.checkpoints}' holds no checkpoint of the {which} epoch: "
            f"what the methods learned is gone{way}"
        )
    prefix = "distiller.methods."
    model = load_checkpoint(kept[-1])["model"]
    state = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
    firsts = {f"{name}_teacher": name for name in distiller.methods}
    if any(key.partition(".")[0] in firsts for key in state):
        parts = ((*key.partition("."), value) for key, value in state.items())
        state = {f"{firsts[name]}.{rest}": value for name, _, rest, value in parts if name in firsts}
    try:
        distiller.methods.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"'{kept[-1]}' holds what methods of another version of diffkd learned; distil again"
        ) from error


def rebuild(run: str, *, which: str = "last", trust: bool = False) -> tuple[Parts, Distiller]:
    """A finished run's parts and its distiller (of several teachers the first's), as it ended, in eval mode.

    Args:
        run: the folder.
        which: "best" has all as it was in the best epoch.
        trust: runs the code that it names.

    Raises:
        UserError: there is no finished run, it was trained without a teacher, its teacher is gone, or it
            names code and is not trusted.
    """
    folder = RunFolder(run)
    summary, recipe = folder.read_summary(), load(str(folder.recipe_file), trust=trust)
    if summary["teacher"] is None:
        raise UserError(f"the run in '{run}' had no teacher")
    seed_everything(recipe.seed)  # a teacher with fresh weights is the same again
    parts = assemble(as_trained(recipe, folder, summary["teacher"]["weights"], which))
    distiller, _ = parts.distiller(parts.sample(2))
    load_methods(distiller, folder, which)
    return parts, distiller.eval()
