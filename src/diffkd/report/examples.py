"""What a comparison's page shows of segmentation: example pictures, and the IoU of every class."""

import base64
import colorsys
import html
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffkd.assembly import assemble
from diffkd.recipe.schema import load
from diffkd.runs.folder import RunFolder
from diffkd.use.trained import as_trained

SCENES = 3
_VOID = (90, 90, 90)


def dense_section(runs: Sequence[tuple[str, RunFolder]], teacher_weights: str | None) -> str:
    """HTML of a comparison of segmentation; empty for other tasks.

    Args:
        runs: each method's name and its finished run, of one seed.
        teacher_weights: the teacher that the runs were compared with.
    """
    summaries = {label: folder.read_summary() for label, folder in runs}
    figures = {label: summary.get("arrays", {}).get("iou") for label, summary in summaries.items()}
    if not figures or None in figures.values() or any(s["agreement"] for s in summaries.values()):
        return ""
    names = next(iter(summaries.values()))["class_names"]
    return "\n".join(
        [
            '<section><h2>Scenes</h2><p class="deck">The first test scenes: picture, truth, and what each '
            "model answers. Grey is void; the last picture is bright where the students differ.</p>",
            *_scenes(runs, teacher_weights),
            '</section><section><h2>Classes</h2><p class="deck">IoU of every class, one seed, in %.</p>',
            _bars(figures, names),
            "</section>",
        ]
    )


def _scenes(runs: Sequence[tuple[str, RunFolder]], teacher_weights: str | None) -> Iterator[str]:
    """A row of pictures for every scene."""
    answers: dict[str, list[Tensor]] = {}
    images, truth, classes = _first_scenes(runs, teacher_weights, answers)
    colours = _palette(classes)
    for i, image in enumerate(images):
        shown = {"picture": image, "truth": colours[truth[i].numpy()]}
        order = sorted(answers, key=lambda label: label != "teacher")
        shown |= {label: colours[answers[label][i].numpy()] for label in order}
        students = torch.stack([answers[label][i] for label, _ in runs])
        differ = (students != students[:1]).any(0).numpy()
        shown["where they differ"] = np.where(differ[..., None], 255, image // 4).astype(np.uint8)
        figures = "".join(_figure(name, pixels) for name, pixels in shown.items())
        yield f'<div class="scroll" style="display:flex;gap:10px;margin-bottom:14px">{figures}</div>'


@torch.no_grad()
def _first_scenes(
    runs: Sequence[tuple[str, RunFolder]], teacher_weights: str | None, answers: dict[str, list[Tensor]]
) -> tuple[list[np.ndarray], list[Tensor], int]:
    """The first test scenes `(H, W, 3)`, their truth `(H, W)` and the number of classes; fills in answers."""
    images: list[np.ndarray] = []
    truth: list[Tensor] = []
    classes = 0
    for label, folder in runs:
        recipe = as_trained(load(str(folder.recipe_file), trust=True), folder, teacher_weights)
        first = "teacher" not in answers and recipe.teacher is not None and bool(recipe.method)
        parts = assemble(recipe, with_teacher=first)
        batch = next(iter(parts.loader(parts.data.test, shuffle=False, batch_size=SCENES).epoch()))
        sides = {label: parts.student} | ({"teacher": parts.teacher} if parts.teacher else {})
        for name, side in sides.items():
            side.model.eval()
            answers[name] = list(parts.task.answers(side.forward(parts.task, batch)))
        images = [_pixels(image) for image in batch.images]
        truth, classes = list(batch.targets), parts.data.num_classes or 0
    return images, truth, classes


def _pixels(image: Tensor) -> np.ndarray:
    scaled = image * 255 if image.is_floating_point() else image
    return scaled.expand(3, -1, -1).permute(1, 2, 0).to(torch.uint8).numpy()


def _palette(classes: int) -> np.ndarray:
    """Colours of the classes and of void, `(256, 3)`: hues far apart, the first one dark."""
    hues = [(i * 0.618034) % 1 for i in range(classes)]
    colours = np.full((256, 3), _VOID, np.uint8)
    for i, hue in enumerate(hues):
        light = (0.25, 0.62, 0.45)[i % 3] if i else 0.15
        colours[i] = [round(255 * part) for part in colorsys.hls_to_rgb(hue, light, 0.75)]
    return colours


def _figure(name: str, pixels: np.ndarray) -> str:
    """A picture that is part of the page, with its name."""
    content = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(content, "PNG")
    source = base64.b64encode(content.getvalue()).decode()
    width = max(pixels.shape[1], 130)
    return (
        f'<figure style="margin:0"><img alt="{_text(name)}" width="{width}" '
        f'style="image-rendering:pixelated" src="data:image/png;base64,{source}">'
        f'<figcaption style="font-size:13px">{_text(name)}</figcaption></figure>'
    )


def _bars(figures: Mapping[str, Sequence[float | None]], names: Sequence[str]) -> str:
    """A table with a bar for every class and method."""
    head = "".join(f"<th>{_text(label)}</th>" for label in figures)
    rows = []
    for i, name in enumerate(names):
        cells = "".join(_bar(values[i]) for values in figures.values())
        rows.append(f"<tr><th>{_text(name)}</th>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th>class</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _bar(value: float | None) -> str:
    if value is None:
        return "<td>in no mask</td>"
    fill = f"linear-gradient(90deg,var(--wash) {100 * value:.1f}%,transparent 0)"
    return f'<td style="background:{fill}">{100 * value:.1f}</td>'


def _text(value: Any) -> str:
    return html.escape(str(value)).encode("ascii", "xmlcharrefreplace").decode()
