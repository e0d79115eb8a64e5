"""A finished run's student, measured again."""

from collections.abc import Iterator

import torch

from diffkd.assembly import assemble, evaluate
from diffkd.randomness import cpu_threads
from diffkd.recipe import load
from diffkd.report.summary import percent
from diffkd.run import RunFolder


def evaluate_run(path: str) -> Iterator[str]:
    """The student's figures on its test data, one line each, in full precision.

    Raises:
        UserError: the folder holds no finished run, or its student is damaged.
    """
    folder = RunFolder(path)
    summary = folder.read_summary()
    weights, _ = folder.read_student()
    recipe = load(str(folder.recipe_file))
    parts = assemble(recipe, with_teacher=False)
    parts.student.model.load_state_dict(weights)
    device = torch.device(summary["device"] if torch.cuda.is_available() else "cpu")
    loader = parts.loader(parts.data.test, shuffle=False, device=device)
    with cpu_threads(recipe.trainer.threads):
        figures = evaluate(parts.student.to(device), parts.task, loader)
    for name, value in figures.items():
        recorded = summary["last"].get(name)
        agrees = "as recorded" if value == recorded else f"recorded: {recorded!r}"
        yield f"{name} {value!r} ({percent(value)}, {agrees})"
