"""The denoising to be looked at: the student's feature before, on its way and after, beside the teacher's."""

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from diffkd.assembly import Parts
from diffkd.batch import Batch
from diffkd.distiller import Distiller
from diffkd.errors import UserError
from diffkd.methods.diffkd import DiffKD, DiffKDMethod
from diffkd.runs.disk import write_atomically
from diffkd.use.predict import find_pictures
from diffkd.use.student import load_student, told_trust
from diffkd.use.trained import rebuild


def visualize(
    run: str, words: Sequence[str], say: Callable[[str], None] = print
) -> tuple[Path, tuple[str, ...]]:
    """Writes `denoising/` in the run folder, or `output`: a PNG for each picture, and a page with them all.

    Of every tapped map, the top row shows how strong the feature is (mean of its channels' sizes), the
    lower one its three main directions as red, green and blue, found on the teacher's feature.

    Args:
        run: the folder of a finished run with method diffkd.
        words: files, folders, patterns, `output=FOLDER`, and `trust=true` for a run of code that the run
            folder names.
        say: is told where the page is.

    Returns:
        The page, and which pictures could not be read, and why.

    Raises:
        UserError: the run did not use DiffKD on a map, or there is no picture that can be read.
    """
    words, trust = told_trust(words)
    outputs = [word.removeprefix("output=") for word in words if word.startswith("output=")]
    places = find_pictures([word for word in words if not word.startswith("output=")])
    parts, distiller = rebuild(run, trust=trust)
    method = next((m for m in distiller.methods.values() if isinstance(m, DiffKDMethod)), None)
    if method is None:
        raise UserError(f"the run in '{run}' did not use method diffkd: there is no denoising to show")
    taps = {name: cast(DiffKD, method.pairs[key]) for name, key in method.keys.items()}
    maps = {name: diffkd for name, diffkd in taps.items() if diffkd.spatial_dims == 2}
    if not maps:
        raise UserError(f"the run in '{run}' denoised no feature map, and vectors are no pictures")
    student, folder = load_student(run, trust=trust), Path(outputs[-1] if outputs else f"{run}/denoising")
    shown: list[tuple[Path, bytes]] = []
    unreadable: list[str] = []
    for number, place in enumerate(places):
        try:
            image = student.read(place)
        except UserError as error:
            unreadable.append(str(error))
            continue
        drawn = _draw(image, _ways(image, parts, distiller, maps))
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{number:03d}-{place.stem}.png"
        write_atomically(file, lambda partial, drawn=drawn: partial.write_bytes(drawn))  # type: ignore[misc]
        shown.append((place, drawn))
    if not shown:
        raise UserError(f"none of {len(places)} pictures can be read: {unreadable[0]}")
    page = folder / "index.html"
    write_atomically(page, lambda partial: partial.write_text(_page(run, shown), encoding="utf-8"))
    say(f"{len(shown)} pictures: {page}")
    return page, tuple(unreadable)


Way = dict[str, Tensor]


@torch.no_grad()
def _ways(image: Tensor, parts: Parts, distiller: Distiller, maps: Mapping[str, DiffKD]) -> dict[str, Way]:
    """By tap, the steps of one picture `(C, H, W)`."""
    # two of a kind: a batch of one would not do for every model
    student, teacher = distiller.features(Batch(torch.stack([image, image])))
    found = {}
    for name, diffkd in maps.items():
        torch.manual_seed(0)  # the same noise for every picture
        found[name] = {k: v[0].float().cpu() for k, v in diffkd.steps(student[name], teacher[name]).items()}
    return found


def _draw(image: Tensor, ways: Mapping[str, Way]) -> bytes:
    """A PNG: two rows for each tap."""
    columns = 1 + max(len(way) - ("gamma" in way) for way in ways.values())
    figure = Figure(figsize=(1.6 * columns, 3.5 * len(ways)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2 * len(ways), columns, squeeze=False)
    for cell in axes.flat:
        cell.axis("off")
    picture = image.permute(1, 2, 0).squeeze(2).numpy()
    for row, (name, way) in enumerate(ways.items()):
        features = {key: value for key, value in way.items() if key != "gamma"}
        directions = _directions(features["teacher"])
        first = axes[2 * row][0]
        first.imshow(picture, cmap="gray")
        gamma = f", gamma {float(way['gamma']):.2f}" if "gamma" in way else ""
        first.set_title(f"{name}{gamma}", fontsize=8, loc="left")
        for column, (key, feature) in enumerate(features.items(), 1):
            heat, colours = axes[2 * row][column], axes[2 * row + 1][column]
            size = picture.shape[:2]
            heat.imshow(picture, cmap="gray", extent=(0, size[1], size[0], 0))
            heat.imshow(feature.abs().mean(0), cmap="inferno", alpha=0.7, extent=(0, size[1], size[0], 0))
            heat.set_title(key, fontsize=8)
            colours.imshow(_coloured(feature, directions))
    content = BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _directions(feature: Tensor) -> Tensor:
    """The three main directions `(C, 3)` of a feature `(C, H, W)`."""
    rows = feature.flatten(1).T
    _, _, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return F.pad(right[:3].T, (0, max(0, 3 - len(right))))


def _coloured(feature: Tensor, directions: Tensor) -> Any:
    """A feature `(C, H, W)` along three directions, as an `(H, W, 3)` picture of 0 to 1."""
    rows = feature.flatten(1).T
    along = (rows - rows.mean(0)) @ directions
    low, high = along.amin(0), along.amax(0)
    scaled = (along - low) / torch.where(high > low, high - low, 1)
    return scaled.reshape(*feature.shape[1:], 3).numpy()


def _page(run: str, shown: Sequence[tuple[Path, bytes]]) -> str:
    """One page, nothing outside it needed."""
    figures = "\n".join(
        f"<h2>{html.escape(str(place))}</h2>\n"
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(drawn).decode()}">'
        for place, drawn in shown
    )
    title = f"Denoising: {html.escape(run)}"
    style = "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    style += "img{max-width:100%}h2{font-size:1rem;overflow-wrap:anywhere}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{style}</style><h1>{title}</h1>\n"
        "<p>Each map from left to right: the student's feature, with noise, after each step, denoised, and "
        "the teacher's. Above: how strong it is. Below: the teacher's three main directions as colours.</p>\n"
        f"{figures}\n</html>\n"
    )
