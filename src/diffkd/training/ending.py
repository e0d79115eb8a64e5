"""What a run leaves behind: its summary, and the student of its best epoch."""

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from diffkd import __version__
from diffkd.assembly import Parts
from diffkd.models import base as models
from diffkd.models.measure import machine
from diffkd.pictures.view import TestView
from diffkd.runs.folder import load_checkpoint, step_of
from diffkd.training.meter import Place

if TYPE_CHECKING:
    from diffkd.training.trainer import Trainer


def describe_student(parts: Parts, figures: Mapping[str, Any]) -> dict[str, Any]:
    """All that is needed to use the student's weights, wherever they lie: `student/config.json`."""
    side, data, wanted = parts.student, parts.data, parts.recipe
    channels, height, width = data.image_shape
    view = data.view or (
        TestView("resize", (height, width), channels=channels)
        if parts.task.resizes
        else TestView("whole", channels=channels)
    )
    return {
        "diffkd": __version__,
        "model": side.name,
        "options": models.without_start(wanted.student.options),
        "input_shape": list(side.input_shape),
        "task": wanted.task.name,
        "task_options": wanted.task.options,
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "image_shape": list(data.image_shape),
        "view": view.as_dict(),
        "mean": side.prepare.mean.flatten().tolist(),
        "std": side.prepare.std.flatten().tolist(),
        "size": side.prepare.size,
        "figures": dict(figures),
    }


def summary_of(
    trainer: "Trainer",
    place: Place,
    best: Mapping[str, float],
    figures: Mapping[str, float],
    teachers: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """All that a finished run says of itself, as `summary.json` has it.

    Args:
        trainer: at its end.
        place: where it ended.
        best: the row of history of the best epoch.
        figures: of the student that is shipped.
        teachers: their figures by name.
    """
    parts, recipe, task = trainer.parts, trainer.recipe, trainer.parts.task
    summary = {
        "recipe": recipe.name,
        "published": recipe.published,
        "methods": list(recipe.method),
        "weights": _weights(trainer),
        "seed": recipe.seed,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "agreement": trainer.agreement,
        "metric_label": task.metric_label + (" agreement with the teacher" if trainer.agreement else ""),
        "last": dict(figures),
        "arrays": place.arrays,
        "class_names": list(parts.data.class_names),
        "best": {name: best[name] for name in figures} | {k: best[k] for k in ("epoch", "step")},
        "chosen_on": trainer.choice.on,
        "ended": place.ended,
        "student": {"model": parts.student.name, **trainer.costs["student"]},
        "teacher": None,
        "epochs": trainer.length.told_epochs(place.step),
        "steps": place.step,
        "axis": trainer.length.unit,
        "extra_parameters": sum(p.numel() for p in trainer.distiller.methods.parameters()),
        "images_per_second": median(row["images_per_second"] for row in place.history),
        "memory_mb": max(row["memory_mb"] for row in place.history),
        "seconds": round(sum(row["seconds"] for row in place.history), 3),
        "figures": list(trainer.distiller.figures),
        "device": str(trainer.fabric.device),
        "machine": machine(str(trainer.fabric.device)),
    }
    found = {
        name: {
            "model": side.name,
            "weights": side.weights,
            **teachers.get(name, {}),
            **trainer.costs[name],
        }
        for name, side in parts.teachers.items()
    }
    summary["teacher"] = found.pop("teacher", None)
    if found:
        summary["teachers"] = found
    return summary


def _weights(trainer: "Trainer") -> dict[str, float]:
    """What methods weigh, by the recipe's names; of several teachers by the losses'."""
    weights, names = trainer.distiller.weights, list(trainer.recipe.method)
    return dict(zip(names, weights.values(), strict=True)) if len(weights) == len(names) else dict(weights)


def write_best(trainer: "Trainer", place: Place, best: Mapping[str, float]) -> None:
    """The student of the best epoch beside the last one's, out of the checkpoint that was kept of it.

    Nothing is written where that checkpoint is gone.

    Args:
        trainer: at its end.
        place: where it ended.
        best: the row of history of the best epoch.
    """
    figures = {name: best[name] for name in place.scalars}
    config = describe_student(trainer.parts, figures) | {
        "chosen_on": trainer.choice.on,
        **{key: best[key] for key in ("epoch", "step")},
    }
    if best["step"] == place.step:
        state = trainer.shipped.model.state_dict()
    else:
        found = [path for path in trainer.folder.list_checkpoints() if step_of(path) == best["step"]]
        if not found:
            return
        kept = load_checkpoint(found[-1])
        prefix = "distiller.student."
        state = kept["ema"] or {
            key.removeprefix(prefix): value for key, value in kept["model"].items() if key.startswith(prefix)
        }
    trainer.folder.write_student(state, config, "student-best")
