"""What a comparison's page shows of segmentation and detection: example pictures, and figures in tables."""

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffkd.assembly import assemble
from diffkd.recipe.schema import load
from diffkd.runs.folder import RunFolder
from diffkd.use.drawing import draw_boxes, palette
from diffkd.use.trained import as_trained

SCENES = 3
SURE = 0.3  # least score of a box that is shown
_VOID = (224, 224, 192)  # as Pascal VOC paints it
_BY_SIZE = {
    "ap": "all",
    "ap50": "all, IoU 0.5",
    "ap75": "all, IoU 0.75",
    "ap_small": "small, below 32 x 32 pixels",
    "ap_medium": "medium",
    "ap_large": "large, above 96 x 96 pixels",
    "voc_ap50": "all, as Pascal VOC counts",
}
Runs = Sequence[tuple[str, RunFolder]]


def example_sections(runs: Runs, teacher_weights: str | None) -> str:
    """HTML of a comparison of segmentation or detection; empty for other tasks.

    Args:
        runs: each method's name and its finished run; a method's first run is the one shown.
        teacher_weights: the teacher that the runs were compared with.
    """
    summaries = [(label, folder.read_summary()) for label, folder in runs]
    if not summaries or any(summary["agreement"] for _, summary in summaries):
        return ""
    shown = dict(reversed(runs))  # the first run of a method
    chosen = [(label, shown[label]) for label in dict.fromkeys(label for label, _ in runs)]
    for figure, sections in (("iou", _segmentation), ("ap_per_class", _detection)):
        if all(figure in summary.get("arrays", {}) for _, summary in summaries):
            return "\n".join(sections(_first_scenes(chosen, teacher_weights), summaries))
    return ""


@dataclass
class _Scenes:
    """The first test pictures, and what is answered about them.

    Attributes:
        images: `(C, H, W)` each; targets: of each, as the task has them.
        answers: what the task predicts for each, by model, the teacher first.
        names: of the classes.
    """

    images: list[Tensor] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    answers: dict[str, list[Any]] = field(default_factory=dict)
    names: tuple[str, ...] = ()


@torch.no_grad()
def _first_scenes(runs: Runs, teacher_weights: str | None) -> _Scenes:
    """Builds every model again and asks it."""
    found = _Scenes()
    teacher: dict[str, list[Any]] = {}
    for label, folder in runs:
        recipe = as_trained(load(str(folder.recipe_file), trust=True), folder, teacher_weights)
        parts = assemble(
            recipe, with_teacher=not teacher and recipe.teacher is not None and bool(recipe.method)
        )
        batch = next(iter(parts.loader(parts.data.test, shuffle=False, batch_size=SCENES, workers=0).epoch()))
        for place, side in ((found.answers, parts.student), (teacher, parts.teacher)):
            if side is not None:
                side.model.eval()
                place["teacher" if side is parts.teacher else label] = list(side.forward(parts.task, batch))
        classes = parts.data.num_classes or 0
        found.images, found.targets = list(batch.images), list(batch.targets)
        found.names = parts.data.class_names or tuple(map(str, range(classes)))
    found.answers = teacher | found.answers
    return found


def _row(figures: Mapping[str, np.ndarray], form: str = "PNG", shrink: bool = False) -> str:
    """Pictures with their names, side by side: all in sight where they may shrink, else scrolled."""
    shown = "".join(_figure(name, pixels, form, shrink) for name, pixels in figures.items())
    columns = f"display:grid;grid-template-columns:repeat({len(figures)},minmax(110px,1fr))"
    how = columns if shrink else "display:flex"
    return f'<div class="scroll" style="{how};gap:10px;margin-bottom:14px">{shown}</div>'


# --- segmentation ----------------------------------------------------------------------------------


def _segmentation(scenes: _Scenes, summaries: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    methods = dict(summaries)
    order = [label for label in scenes.answers if label in methods]
    yield (
        '<section><h2>Scenes</h2><p class="deck">The first test scenes: picture, truth, and what each '
        "model answers; the last picture is bright where the students differ.</p>"
    )
    colours = np.full((256, 3), _VOID, np.uint8)
    colours[: len(scenes.names)] = palette(len(scenes.names)).numpy()
    answered = [scores.argmax(0) for given in scenes.answers.values() for scores in given]
    seen = sorted({k for labels in (*scenes.targets, *answered) for k in labels.flatten().tolist()})
    yield _legend({scenes.names[k] if k < len(scenes.names) else "void": colours[k] for k in seen})
    for i, image in enumerate(map(_pixels, scenes.images)):
        answers = {label: given[i].argmax(0) for label, given in scenes.answers.items()}
        shown = {"picture": image, "truth": colours[scenes.targets[i].numpy()]}
        shown |= {label: colours[answer.numpy()] for label, answer in answers.items()}
        students = torch.stack([answers[label] for label in order])
        differ = (students != students[:1]).any(0).numpy()
        shown["where they differ"] = np.where(differ[..., None], 255, image // 4).astype(np.uint8)
        yield _row(shown, shrink=True)
    yield "</section>"


def _legend(colours: Mapping[str, np.ndarray]) -> str:
    """Names of classes beside their colours."""
    patch = "display:inline-block;width:12px;height:12px;margin-right:6px;border:1px solid var(--line)"
    parts = [
        f'<span style="white-space:nowrap"><span style="{patch};background:rgb{tuple(map(int, colour))}">'
        f"</span>{_text(name)}</span>"
        for name, colour in colours.items()
    ]
    how = "display:flex;flex-wrap:wrap;gap:4px 18px;margin-bottom:14px;font-size:13px"
    return f'<div style="{how}">{"".join(parts)}</div>'


# --- detection -------------------------------------------------------------------------------------


def _detection(scenes: _Scenes, summaries: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    yield (
        '<section><h2>Pictures</h2><p class="deck">The first test pictures: the truth, and what each model '
        f"finds with a score of {SURE} or more.</p>"
    )
    for i, (image, target) in enumerate(zip(scenes.images, scenes.targets, strict=True)):
        origin = target.get("origin", tuple(image.shape[-2:]))
        true = ~target.get("ignore", torch.zeros_like(target["labels"], dtype=torch.bool))
        shown = {"truth": _with_boxes(image, target, true, origin, scenes.names)}
        for label, given in scenes.answers.items():
            shown[label] = _with_boxes(image, given[i], given[i]["scores"] >= SURE, origin, scenes.names)
        yield _row(shown, "JPEG")
    seeds = max(sum(label == known for known, _ in summaries) for label, _ in summaries)
    yield (
        '</section><section><h2>Sizes</h2><p class="deck">Average precision by the size of the objects, '
        f"{'one seed' if seeds == 1 else f'mean of {seeds} seeds'}, in %.</p>"
    )
    yield _bars(*_by_size(summaries), "objects")
    yield "</section>"


def _with_boxes(
    image: Tensor, found: Mapping[str, Tensor], keep: Tensor, origin: tuple[int, int], names: Sequence[str]
) -> np.ndarray:
    """A picture `(H, W, 3)` with some of the boxes.

    Args:
        image: `(C, H, W)`.
        found: `boxes`, `labels`, maybe `scores`.
        keep: which of them.
        origin: `(H, W)` in pixels of which the boxes are.
        names: of the classes.
    """
    picture, scores = Image.fromarray(_pixels(image)), found.get("scores")
    sure = None if scores is None else scores[keep]
    drawn = draw_boxes(picture, found["boxes"][keep], found["labels"][keep], names, sure, origin=origin)
    return drawn.permute(1, 2, 0).numpy()


def _by_size(
    summaries: Sequence[tuple[str, Mapping[str, Any]]],
) -> tuple[dict[str, list[float | None]], list[str]]:
    """Figures of the teacher and each method, mean over its runs, and what they are of."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    taught = next((summary["teacher"] for _, summary in summaries if summary["teacher"]), None)
    if taught is not None:
        rows["teacher"] = [taught]
    for label, summary in summaries:
        rows.setdefault(label, []).append(summary["last"])
    known = [key for key in _BY_SIZE if any(key in row for found in rows.values() for row in found)]
    figures = {
        label: [_mean([row[key] for row in found if row.get(key) is not None]) for key in known]
        for label, found in rows.items()
    }
    return figures, [_BY_SIZE[key] for key in known]


def _mean(values: list[float]) -> float | None:
    return mean(values) if values else None


# --- parts of the page -----------------------------------------------------------------------------


def _pixels(image: Tensor) -> np.ndarray:
    scaled = image * 255 if image.is_floating_point() else image
    return scaled.expand(3, -1, -1).permute(1, 2, 0).to(torch.uint8).numpy()


def _figure(name: str, pixels: np.ndarray, form: str, shrink: bool) -> str:
    """A picture that is part of the page, with its name."""
    content = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(content, form)
    source = base64.b64encode(content.getvalue()).decode()
    width = "100%" if shrink else max(pixels.shape[1], 130)
    return (
        f'<figure style="margin:0"><img alt="{_text(name)}" width="{width}" '
        f'style="image-rendering:pixelated;height:auto" src="data:image/{form.lower()};base64,{source}">'
        f'<figcaption style="font-size:13px">{_text(name)}</figcaption></figure>'
    )


def _bars(figures: Mapping[str, Sequence[float | None]], names: Sequence[str], what: str) -> str:
    """A table with a bar for every row, by name, and model."""
    head = "".join(f"<th>{_text(label)}</th>" for label in figures)
    rows = []
    for i, name in enumerate(names):
        cells = "".join(_bar(values[i]) for values in figures.values())
        rows.append(f"<tr><th>{_text(name)}</th>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th>{what}</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _bar(value: float | None) -> str:
    if value is None:
        return "<td>&#8211;</td>"
    fill = f"linear-gradient(90deg,var(--wash) {100 * value:.1f}%,transparent 0)"
    return f'<td style="background:{fill}">{100 * value:.1f}</td>'


def _text(value: Any) -> str:
    return html.escape(str(value)).encode("ascii", "xmlcharrefreplace").decode()
