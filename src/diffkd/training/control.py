"""The student alone: the run that differs from a distillation in nothing but what distils."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from diffkd.errors import UserError
from diffkd.recipe.files import code_names
from diffkd.recipe.reading import read_file
from diffkd.recipe.schema import Recipe, load
from diffkd.runs.console import Reporter
from diffkd.runs.folder import RunFolder
from diffkd.runs.identity import Identity, changed, difference
from diffkd.runs.places import check_folder
from diffkd.training.evaluation import Witness
from diffkd.training.fit import fit
from diffkd.training.interrupt import InterruptedRunError


def control_recipe(recipe: Recipe, output: Path | None = None) -> Recipe:
    """The recipe without teacher, method and what belongs to them.

    Args:
        recipe: of the distillation.
        output: folder of the run.

    >>> control_recipe(load("digits")).method
    {}
    """
    return recipe.model_copy(
        update={
            "method": {},
            "teacher": None,
            "teachers": {},
            "taps": None,
            "control": False,
            "output": None if output is None else str(output),
            "resume": True,
        }
    )


def fit_with_control(
    recipe: Recipe, reporter: Reporter | None = None, witness: Witness | None = None
) -> RunFolder:
    """Runs a recipe, and after it its student alone where the recipe says `control` and no such run is there.

    Args:
        recipe: the run.
        reporter: says what happens.
        witness: of the distilled student's last evaluation.

    Raises:
        UserError: as in `fit`; the control's folder holds another run, and then nothing is run.
        InterruptedRunError: asked to stop; the same command with `resume=true` goes on.
    """
    place = _own_place(recipe.run_folder())
    alone = control_recipe(recipe, place)
    wanted = recipe.control and _compares(recipe)
    if wanted:
        check_folder(RunFolder(place), alone)
    folder = fit(recipe, reporter, witness)
    if wanted and _find(folder, recipe, recipe.name) is None:
        said = reporter or Reporter(progress=recipe.trainer.progress)
        said.note(f"student alone: training it for comparison, in {place}")
        try:
            fit(alone, said.silent("student alone"))
        except InterruptedRunError as error:
            line = "stopped while the student alone was trained; saved; with resume=true the command goes on"
            raise InterruptedRunError(line, error.signal) from error
    return folder


def find_control(folder: RunFolder) -> RunFolder | None:
    """The finished run of the student alone that belongs to a run; None where there is none.

    It is looked for beside the run, and in the place that `diffkd train` takes by itself.

    Args:
        folder: of a finished run.
    """
    try:
        recipe = load(str(folder.recipe_file), trust=True)
        return _find(folder, recipe, folder.read_summary()["recipe"])
    except UserError:
        return None


def _find(folder: RunFolder, recipe: Recipe, name: str) -> RunFolder | None:
    wanted, identity = control_recipe(recipe), folder.read_identity()
    for place in dict.fromkeys(_places(folder.path, name, recipe.seed)):
        other = RunFolder(place)
        try:
            if other.finished and _is_control(other, wanted, identity):
                return other
        except UserError:  # a damaged run, or another thing of that name
            continue
    return None


def control_hint(folder: RunFolder) -> str | None:
    """The command that trains the student alone; None where a run has no use for one.

    Args:
        folder: of a finished run.
    """
    recipe = load(str(folder.recipe_file), trust=True)
    if not _compares(recipe):
        return None
    trust = " trust=true" * any(True for _ in code_names(read_file(folder.recipe_file)))
    output = shlex.quote(f"output={_own_place(folder.path)}")
    return f"diffkd train {shlex.quote(str(folder.recipe_file))} {output}{trust}"


def _compares(recipe: Recipe) -> bool:
    return bool(recipe.method) and recipe.data.options.get("labels") != "none"


def _own_place(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-alone")


def _places(folder: Path, name: str, seed: int) -> Iterator[Path]:
    yield _own_place(folder)
    yield folder.parent / f"none-seed{seed}"
    yield Path("runs") / name / f"none-seed{seed}"


def _is_control(other: RunFolder, wanted: Recipe, identity: Identity) -> bool:
    recipe = load(str(other.recipe_file), trust=True)
    if recipe.method or difference(control_recipe(recipe), wanted) is not None:
        return False
    return changed(other.read_identity(), _of_student(identity, other.read_identity())) is None


def _of_student(identity: Identity, alone: Identity) -> Identity:
    """What of a run's identity its student alone has, too."""
    return {
        part: {k: v for k, v in values.items() if part not in ("weights", "code") or k in alone.get(part, {})}
        for part, values in identity.items()
    }
