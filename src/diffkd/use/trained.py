"""A finished run built again: its models with their weights, its methods as they ended."""

from diffkd.assembly import Parts, assemble
from diffkd.distiller import Distiller
from diffkd.errors import UserError
from diffkd.maths.randomness import seed_everything
from diffkd.recipe.schema import ModelRecipe, Recipe, load
from diffkd.runs.folder import RunFolder, load_checkpoint


def as_trained(recipe: Recipe, folder: RunFolder, teacher_weights: str | None) -> Recipe:
    """A run's recipe with the weights that it ended with, and its teacher's as they were found or made."""
    found: dict[str, ModelRecipe] = {
        "student": recipe.student.model_copy(update={"weights": str(folder.path), "weights_by_order": False})
    }
    if recipe.teacher is not None:
        found["teacher"] = recipe.teacher.model_copy(update={"weights": teacher_weights, "train": None})
    return recipe.model_copy(update=found)


def load_methods(distiller: Distiller, folder: RunFolder) -> None:
    """Gives a distiller's methods what they had learned when the run ended.

    Raises:
        UserError: the run keeps no checkpoint, or one of another version's methods.
    """
    kept = folder.list_checkpoints()
    if not kept:
        raise UserError(f"'{folder.checkpoints}' holds no checkpoint: what the methods learned is gone")
    prefix = "distiller.methods."
    model = load_checkpoint(kept[-1])["model"]
    state = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
    try:
        distiller.methods.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"'{kept[-1]}' holds what methods of another version of diffkd learned; distil again"
        ) from error


def rebuild(run: str, *, trust: bool = False) -> tuple[Parts, Distiller]:
    """A finished run's parts and its distiller, as it ended, in eval mode.

    Args:
        run: the folder.
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
    parts = assemble(as_trained(recipe, folder, summary["teacher"]["weights"]))
    distiller, _ = parts.distiller(parts.sample(2))
    load_methods(distiller, folder)
    return parts, distiller.eval()
