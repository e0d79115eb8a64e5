"""How alike the student's features and the teacher's are at the end of a run."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffkd.assembly import Parts, assemble
from diffkd.distiller import Distiller
from diffkd.errors import UserError
from diffkd.maths.layers import pooled
from diffkd.maths.randomness import cpu_threads, seed_everything
from diffkd.pictures.held import classes_in, part_of, spread
from diffkd.recipe.schema import MethodRecipe, Recipe, load
from diffkd.runs.disk import read_json
from diffkd.runs.folder import RunFolder
from diffkd.use.trained import as_trained, load_methods

MOST_PICTURES = 2048
# Taps features for runs whose methods tap none, and has no weights of its own.
OBSERVER = "sp"
ESTIMATOR = "unbiased HSIC, even classes"  # what else is found in a run folder is measured anew

Similarity = dict[str, dict[str, float | None]]


def linear_cka(one: Tensor, other: Tensor) -> float | None:
    """Linear centred kernel alignment of two features of the same samples, by the unbiased HSIC.

    1 for features that are the same up to rotation and scale, about 0 (a little below, too) for
    independent ones, however many channels they have. None where one of them is constant, or there are
    fewer than 4 samples.

    Kornblith et al., ICML 2019, arXiv 1905.00414; the estimator of Song et al., JMLR 2012, for it in
    Nguyen et al., ICLR 2021, arXiv 2010.15327.

    Args:
        one: `(N, C)`.
        other: `(N, D)`.

    >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    >>> round(linear_cka(x, 3 * x + 1), 6)
    1.0
    """
    if len(one) < 4:
        return None
    kernels = [_kernel(x) for x in (one, other)]
    shared = _unbiased_hsic(*kernels)
    alone = [_unbiased_hsic(kernel, kernel) for kernel in kernels]
    if min(alone) <= 1e-12:
        return None
    return float(shared / (alone[0] * alone[1]).sqrt())


def _kernel(x: Tensor) -> Tensor:
    """Products of every two samples `(N, N)` with an empty diagonal, scaled to a mean square of 1 or less."""
    centred = x.double() - x.double().mean(0)
    scale = centred.square().sum(1).mean().clamp_min(1e-30)
    return (centred @ centred.T / scale).fill_diagonal_(0)


def _unbiased_hsic(one: Tensor, other: Tensor) -> Tensor:
    n = len(one)
    rows, columns = one.sum(1), other.sum(1)
    corrected = rows.sum() * columns.sum() / ((n - 1) * (n - 2)) - 2 * rows @ columns / (n - 2)
    return ((one * other).sum() + corrected) / (n * (n - 3))


def similarity(folder: RunFolder, teacher_weights: str | None) -> Similarity:
    """Linear CKA of each tapped pair of features on test pictures, before and after the method's layers.

    The pictures are spread evenly over the classes, and are the same for every run. Features are averaged
    over their positions. Kept in the run folder, and read from there later on. Of several teachers the
    first's features are taken.

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
    folder.write_text(place.name, json.dumps({"estimator": ESTIMATOR, "pairs": found}, indent=2) + "\n")
    return found


def _read(place: Path) -> Similarity | None:
    """What was measured before; None where it was not, or where the file is damaged: it is measured anew."""
    try:
        kept = read_json(place)
    except UserError:
        return None
    if kept.get("estimator") != ESTIMATOR:
        return None
    found = kept.get("pairs")
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
    test = parts.data.test
    chosen = part_of(test, spread(classes_in(test), len(test), MOST_PICTURES), training=False)
    for batch in parts.loader(chosen, shuffle=False, device=device).epoch():
        student, teacher = distiller.features(batch)
        names = [pair.name for pair in distiller.pairs if not pair.is_logits]
        _add(before, {name: (student[name], teacher[name]) for name in names})
        for method in distiller.methods.values():
            matched: Mapping[str, tuple[Tensor, Tensor]] = method.matched(student, teacher)  # type: ignore[operator]
            _add(after, {name: matched[name] for name in names if name in matched})
    return before, after


def _add(rows: Rows, features: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (ours, theirs) in features.items():
        rows.setdefault(name, []).append((pooled(ours).float().cpu(), pooled(theirs).float().cpu()))


def _joined(rows: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    ours, theirs = zip(*rows, strict=True)
    return torch.cat(ours), torch.cat(theirs)
