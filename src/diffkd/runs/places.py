"""Where runs and trained teachers are kept, and whether they may be."""

import os
from collections.abc import Callable
from pathlib import Path

from diffkd.errors import UserError
from diffkd.recipe.schema import Recipe, load
from diffkd.runs.disk import free_space, read_json
from diffkd.runs.folder import RunFolder
from diffkd.runs.identity import Identity, changed, difference

CACHE_ROOM = 200 * 2**20  # bytes that must be free before a teacher is trained into the cache


def check_cache(place: Path) -> None:
    """Raises UserError where the cache folder is not writable or nearly full."""
    hint = "set the environment variable DIFFKD_CACHE to another folder"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache folder '{place.parent}': {error.strerror}; {hint}") from error
    if not os.access(place.parent, os.W_OK):
        raise UserError(f"cache folder '{place.parent}' is not writable; {hint}")
    if free_space(place.parent) < CACHE_ROOM:
        raise UserError(f"no space left in the cache folder '{place.parent}'; make room, or {hint}")


def check_identity(
    folder: RunFolder, identity: Identity, warn: Callable[[str], None] = lambda _: None
) -> None:
    """Checks that a run's data, weights, code and versions are still those that it was made with.

    Args:
        folder: of the run; one that does not say what it was made with passes.
        identity: of what is at hand.
        warn: is told where the run's own account is damaged.

    Raises:
        UserError: something differs; it is named.
    """
    try:
        made_with = folder.read_identity()
    except UserError as error:
        return warn(f"{error}; it is made anew, and whether the run was made with the same is not known")
    differing = changed(made_with, identity)
    if differing is not None:
        raise UserError(
            f"the run in '{folder.path}' was made on other {differing}; set output= for a new run"
        )
    return None


def check_folder(folder: RunFolder, recipe: Recipe) -> None:
    """Raises UserError where the run folder may not be written to, or holds another run."""
    if not folder.exists():
        parent = folder.path.absolute()
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(
                f"run folder '{folder.path}' cannot be made: '{parent}' is not a writable folder; set output="
            )
        return
    if not recipe.resume:
        raise UserError(
            f"run folder '{folder.path}' exists; resume=true goes on with it, output=... starts another"
        )
    if not folder.recipe_file.is_file():
        raise UserError(f"'{folder.path}' is not a run folder (it has no recipe.yaml); set output=")
    differing = difference(load(str(folder.recipe_file), trust=True), recipe)
    if differing is not None:
        raise UserError(
            f"the run in '{folder.path}' was made with another recipe: {differing}; set output= for a new "
            f"run, which student.weights={folder.path} begins where this one ended"
        )


def note_use(teacher: Path, run: Path) -> None:
    """Writes down beside a made teacher that a run learns from it; where that cannot be, it is left."""
    line = str(run.absolute())
    try:
        if line not in _lines(teacher):
            with uses_file(teacher).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    except OSError:
        pass


def users(teacher: Path) -> list[Path]:
    """The runs that learn from a made teacher, of those that are still there."""
    return [Path(line) for line in _lines(teacher) if _learns_from(RunFolder(line), teacher)]


def _learns_from(folder: RunFolder, teacher: Path) -> bool:
    """Whether a run that noted its use of a teacher is still there: another may have its place by now."""
    if not folder.recipe_file.is_file():
        return False
    if not folder.finished:
        return True
    try:
        summary = read_json(folder.path / "summary.json")
        taught = [summary["teacher"] or {}, *(summary.get("teachers") or {}).values()]
        weights = [Path(side["weights"]) for side in taught if side.get("weights")]
    except (UserError, KeyError, TypeError, AttributeError):
        return True  # a damaged run: rather keep what it may need
    return any(place.is_relative_to(teacher.absolute()) for place in weights)


def uses_file(teacher: Path) -> Path:
    """Beside a made teacher, the runs that learn from it."""
    return teacher.with_name(f"{teacher.name}.runs")


def _lines(teacher: Path) -> list[str]:
    place = uses_file(teacher)
    return place.read_text(encoding="utf-8").splitlines() if place.is_file() else []
