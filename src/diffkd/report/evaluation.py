"""A finished run's student, measured again."""

from collections.abc import Iterator

import torch

from diffkd.assembly import assemble, evaluate
from diffkd.maths.randomness import cpu_threads, seed_everything
from diffkd.recipe.schema import load
from diffkd.report.summary import percent
from diffkd.runs.folder import RunFolder
from diffkd.use.trained import as_trained


def evaluate_run(path: str) -> Iterator[str]:
    """The student's figures on its test data, one line each, in full precision.

    Raises:
        UserError: the folder holds no finished run, or its student is damaged.
    """
    folder = RunFolder(path)
    summary = folder.read_summary()
    recipe = load(str(folder.recipe_file))
    weights = summary["teacher"]["weights"] if summary["teacher"] else None
    seed_everything(recipe.seed)  # a teacher with fresh weights is the same again
    parts = assemble(as_trained(recipe, folder, weights), with_teacher=summary["agreement"])
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
