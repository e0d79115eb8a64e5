"""A finished run's student, measured again."""

from collections.abc import Iterator, Sequence

import torch

from diffkd.assembly import Parts, assemble, evaluate
from diffkd.errors import UserError
from diffkd.maths.randomness import cpu_threads, seed_everything
from diffkd.models.weights import description
from diffkd.recipe.schema import load
from diffkd.report.summary import percent
from diffkd.runs.folder import RunFolder
from diffkd.use.trained import as_trained


def evaluate_run(path: str, words: Sequence[str] = ()) -> Iterator[str]:
    """The student's figures on its test data, or on other data, one line each, in full precision.

    Args:
        path: a run folder.
        words: `data.root=...` and other `data.` keys, `trainer.threads`, and `trust=true` for a run of
            code that the run folder names.

    Raises:
        UserError: the folder holds no finished run, its student is damaged, or the data do not fit it.
    """
    folder = RunFolder(path)
    for word in words:
        if not word.startswith(("data.", "data=", "trainer.threads=", "trust=")):
            raise UserError(f"evaluate takes data.KEY=..., trainer.threads=N and trust=true, not '{word}'")
    summary = folder.read_summary()
    damage = folder.damage()
    if damage is not None:
        raise UserError(damage)
    recipe = load(str(folder.recipe_file), words)
    weights = summary["teacher"]["weights"] if summary["teacher"] else None
    seed_everything(recipe.seed)  # a teacher with fresh weights is the same again
    parts = assemble(as_trained(recipe, folder, weights), with_teacher=summary["agreement"])
    _check_classes(parts, folder)
    device = torch.device(summary["device"] if torch.cuda.is_available() else "cpu")
    loader = parts.loader(parts.data.test, shuffle=False, device=device)
    with cpu_threads(recipe.trainer.threads):
        figures = evaluate(
            parts.student.to(device), parts.task, loader, parts.teacher and parts.teacher.to(device)
        )
    for name, value in figures.scalars.items():
        recorded = summary["last"].get(name)
        agrees = "as recorded" if value == recorded else f"recorded: {recorded!r}"
        yield f"{name} {value!r} ({percent(value)}, {agrees})"


def _check_classes(parts: Parts, folder: RunFolder) -> None:
    """Refuses data whose classes are others, or stand in another order, than those it was trained on."""
    known = description(folder.path).get("class_names") or []
    names = list(parts.data.class_names)
    if known and names and known != names:
        first = next((pair for pair in zip(known, names, strict=False) if pair[0] != pair[1]), None)
        why = f"'{first[1]}' stands where '{first[0]}' stood" if first else f"{len(names)} for {len(known)}"
        raise UserError(f"the classes of the data are not those of '{folder.path}': {why}")
