"""How alike the student's features and the teacher's are at the end of a run."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffkd.assembly import Parts, assemble
from diffkd.distiller import Distiller
from diffkd.maths.layers import pooled
from diffkd.maths.randomness import cpu_threads, seed_everything
from diffkd.recipe.schema import MethodRecipe, Recipe, load
from diffkd.runs.folder import RunFolder
from diffkd.use.trained import as_trained, load_methods

MOST_PICTURES = 2048
# Taps features for runs whose methods tap none, and has no weights of its own.
OBSERVER = "sp"

Similarity = dict[str, dict[str, float | None]]


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment of two features of the same samples, 0 to 1.

    Kornblith et al., ICML 2019, arXiv 1905.00414.

    Args:
        one: `(N, C)`.
        other: `(N, D)`.

    >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    >>> round(linear_cka(x, 3 * x + 1), 6)
    1.0
    """
    one, other = (x.double() - x.double().mean(0) for x in (one, other))
    shared = (one.T @ other).square().sum()
    alone = (one.T @ one).norm() * (other.T @ other).norm()
    return float(shared / alone.clamp_min(1e-30))


def similarity(folder: RunFolder, teacher_weights: str | None) -> Similarity:
    """Linear CKA of each tapped pair of features on test pictures, before and after the method's layers.

    Features are averaged over their positions. Kept in the run folder, and read from there later on.

    Args:
        folder: of a finished run.
        teacher_weights: the teacher that the runs were compared with.
    """
    place = folder.path / "similarity.json"
    kept = _read(place)
    if kept is not None:
        return kept
    recipe = load(str(folder.recipe_file), trust=True)  # the user's own, or trusted when it was run
    if recipe.teacher is None or (recipe.teacher.train is not None and teacher_weights is None):
        return {}  # only runs without a teacher: none was made
    with cpu_threads(recipe.trainer.threads):
        method = recipe.method if "diffkd" in recipe.method else {OBSERVER: MethodRecipe()}
        trained = as_trained(recipe, folder, teacher_weights).model_copy(update={"method": method})
        found = _measure(trained, folder)
    folder.write_text(place.name, json.dumps(found, indent=2) + "\n")
    return found


def _read(place: Path) -> Similarity | None:
    """What was measured before; None where it was not, or where the file is damaged: it is measured anew."""
    try:
        found = json.loads(place.read_bytes())
    except (OSError, ValueError):
        return None
    sides = ("before", "after")
    whole = isinstance(found, dict) and all(
        isinstance(row, dict)
        and all(side in row and isinstance(row[side], float | int | None) for side in sides)
        for row in found.values()
    )
    return found if whole else None


def _measure(recipe: Recipe, folder: RunFolder) -> Similarity:
    seed_everything(recipe.seed)
    parts = assemble(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    distiller, _ = parts.distiller(parts.sample(2))
    if "diffkd" in recipe.method:
        load_methods(distiller, folder)
    assert parts.teacher is not None
    parts.teacher.to(device)
    parts.student.to(device)
    distiller.to(device).eval()
    before, after = _features(distiller, parts, device)
    found: Similarity = {
        name: {"before": linear_cka(*_joined(rows)), "after": None} for name, rows in before.items()
    }
    for name, rows in after.items():
        found[name]["after"] = linear_cka(*_joined(rows))
    return found


Rows = dict[str, list[tuple[Tensor, Tensor]]]


@torch.no_grad()
def _features(distiller: Distiller, parts: Parts, device: torch.device) -> tuple[Rows, Rows]:
    """Pooled features of student and teacher, as they are and as the methods match them."""
    before: Rows = {}
    after: Rows = {}
    seen = 0
    for batch in parts.loader(parts.data.test, shuffle=False, device=device).epoch():
        student, teacher = distiller.features(batch)
        names = [pair.name for pair in distiller.pairs if not pair.is_logits]
        _add(before, {name: (student[name], teacher[name]) for name in names})
        for method in distiller.methods.values():
            matched: Mapping[str, tuple[Tensor, Tensor]] = method.matched(student, teacher)  # type: ignore[operator]
            _add(after, {name: matched[name] for name in names if name in matched})
        seen += len(batch.images)
        if seen >= MOST_PICTURES:
            break
    return before, after


def _add(rows: Rows, features: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (ours, theirs) in features.items():
        rows.setdefault(name, []).append((pooled(ours).float().cpu(), pooled(theirs).float().cpu()))


def _joined(rows: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    ours, theirs = zip(*rows, strict=True)
    return torch.cat(ours), torch.cat(theirs)
