"""The denoising to be looked at: the student's feature before, on its way and after, beside the teacher's."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from diffkd.batch import Batch
from diffkd.distiller import Distiller
from diffkd.errors import UserError
from diffkd.methods.diffkd import DiffKD, DiffKDMethod
from diffkd.runs.disk import write_atomically
from diffkd.runs.folder import RunFolder
from diffkd.tasks.base import Task
from diffkd.tasks.segmentation import Segmentation
from diffkd.use.predict import find_pictures
from diffkd.use.student import load_student
from diffkd.use.trained import rebuild
from diffkd.use.words import told_options

_WIDTH = 1.6  # inches of a map


class Shown(NamedTuple):
    """What `visualize` did.

    Attributes:
        page: with all pictures.
        pictures: how many are on it.
        unreadable: pictures that could not be read, and why.
        single: taps that are not drawn, for they have one position.
        first: the teacher that is shown, where there were several; else empty.
    """

    page: Path
    pictures: int
    unreadable: tuple[str, ...]
    single: tuple[str, ...]
    first: str = ""


def visualize_words(run: str, words: Sequence[str]) -> tuple[str, ...]:
    """`visualize` with a command line's words; prints what was written, and gives what could not be read.

    Raises:
        UserError: as `visualize`, or an option's value cannot be understood.
    """
    options, pictures = told_options(words, ("output", "which", "trust"))
    which, trust = options.get("which", "last"), options.get("trust") == "true"
    shown = visualize(run, pictures, options.get("output"), which=which, trust=trust)  # type: ignore[arg-type]
    if shown.first:
        print(f"of several teachers the first is shown, and what was learned from it: {shown.first}")
    for name in shown.single:
        print(f"{name}: not drawn, it has a single position")
    print(f"{shown.pictures} picture{'s' * (shown.pictures != 1)}: {shown.page}")
    return shown.unreadable


def visualize(
    run: str,
    pictures: Sequence[str],
    output: str | None = None,
    *,
    which: Literal["last", "best"] = "last",
    trust: bool = False,
) -> Shown:
    """Writes `denoising/` in the run folder, or `output`: a PNG for each picture, and a page with them all.

    Of every tapped map, the top row shows how strong the feature is (mean of its channels' sizes), the
    lower one its three main directions as red, green and blue, found on the teacher's feature. Of several
    teachers the first is shown.

    Args:
        run: the folder of a finished run with method diffkd.
        pictures: files, folders, patterns.
        output: the folder to write to.
        which: of its students, each with what the method had learned then.
        trust: runs the code that the run folder names.

    Raises:
        UserError: the run did not use DiffKD on a map, or there is no picture that can be read.
    """
    places = find_pictures(pictures)
    parts, distiller = rebuild(run, which=which, trust=trust)
    method = next((m for m in distiller.methods.values() if isinstance(m, DiffKDMethod)), None)
    if method is None:
        raise UserError(f"the run in '{run}' did not use method diffkd: there is no denoising to show")
    taps = {name: cast(DiffKD, method.pairs[key]) for name, key in method.keys.items()}
    maps = {name: diffkd for name, diffkd in taps.items() if diffkd.spatial_dims == 2}
    if not maps:
        raise UserError(f"the run in '{run}' denoised no feature map, and vectors are no pictures")
    student, folder = load_student(run, trust=trust, which=which), Path(output or f"{run}/denoising")
    shown: list[tuple[Path, bytes]] = []
    unreadable: list[str] = []
    single: dict[str, None] = {}
    for number, place in enumerate(places):
        try:
            image = student.read(place)
        except UserError as error:
            unreadable.append(str(error))
            continue
        ways = _ways(image, parts.task, distiller, maps)
        drawable = {name: way for name, way in ways.items() if way.features["teacher"][0].numel() > 1}
        single |= dict.fromkeys(name for name in ways if name not in drawable)
        drawn = _draw(image, drawable or ways)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{number:03d}-{place.stem}.png"
        write_atomically(file, lambda partial, drawn=drawn: partial.write_bytes(drawn))  # type: ignore[misc]
        shown.append((place, drawn))
    if not shown:
        raise UserError(f"none of {len(places)} pictures can be read: {unreadable[0]}")
    page = folder / "index.html"
    write_atomically(page, lambda partial: partial.write_text(_page(run, shown), encoding="utf-8"))
    several = bool(RunFolder(run).read_summary().get("teachers"))
    first = parts.teacher.name if several and parts.teacher is not None else ""
    return Shown(page, len(shown), tuple(unreadable), tuple(single), first)


class Way(NamedTuple):
    """One picture's features at a tap.

    Attributes:
        features: `(C, h, w)` each, in their order.
        gamma: how much of the student's feature stays beside the noise; None where nothing is denoised.
        reach: height and width that the features cover, as shares of the picture's: the last row and column
            may see padding, too.
    """

    features: dict[str, Tensor]
    gamma: float | None
    reach: tuple[float, float]


@torch.no_grad()
def _ways(image: Tensor, task: Task, distiller: Distiller, maps: Mapping[str, DiffKD]) -> dict[str, Way]:
    """By tap, the steps of one picture `(C, H, W)`, each cut to where the picture lies."""
    # two of a kind: a batch of one would not do for every model
    images = torch.stack([image, image])
    # a label map tells the task how far it pads
    blank = torch.zeros(2, *image.shape[1:], dtype=torch.long) if isinstance(task, Segmentation) else None
    framed = task.frame(Batch(images, blank))
    seen = framed.images if framed.valid is None else framed.valid
    share = [has / whole for has, whole in zip(image.shape[1:], seen.shape[-2:], strict=True)]  # type: ignore[union-attr]
    student, teacher = distiller.features(framed)
    found = {}
    for name, diffkd in maps.items():
        torch.manual_seed(0)  # the same noise for every picture
        steps = {k: v[0].float().cpu() for k, v in diffkd.steps(student[name], teacher[name]).items()}
        gamma = steps.pop("gamma", None)
        size = steps["teacher"].shape[1:]
        # without the rows and columns that see padding alone
        rows, columns = (math.ceil(n * part - 1e-6) for n, part in zip(size, share, strict=True))
        found[name] = Way(
            {k: v[:, :rows, :columns] for k, v in steps.items()},
            None if gamma is None else float(gamma),
            (rows / (size[0] * share[0]), columns / (size[1] * share[1])),
        )
    return found


def _draw(image: Tensor, ways: Mapping[str, Way]) -> bytes:
    """A PNG: two rows for each tap."""
    columns = 1 + max(len(way.features) for way in ways.values())
    height = _WIDTH * min(max(image.shape[1] / image.shape[2], 0.4), 2.5)
    figure = Figure(figsize=(_WIDTH * columns, (2 * height + 0.7) * len(ways)), layout="constrained")
    FigureCanvasAgg(figure)
    picture = image.permute(1, 2, 0).squeeze(2).numpy()
    parts = figure.subfigures(len(ways), 1, squeeze=False).flat
    for part, (name, way) in zip(parts, ways.items(), strict=True):
        gamma = "" if way.gamma is None else f", gamma {way.gamma:.2f}"
        part.suptitle(f"{name}{gamma}", fontsize=9, x=0.01, ha="left")
        cells: Any = part.subplots(2, columns, squeeze=False)
        for cell in cells.flat:
            cell.axis("off")
        cells[0][0].imshow(picture, cmap="gray")
        directions = _directions(way.features["teacher"])
        for column, (key, feature) in enumerate(way.features.items(), 1):
            shown = feature.abs().mean(0).numpy(), _coloured(feature, directions)
            _maps(cells[:, column], picture, way.reach, shown)
            cells[0][column].set_title(key, fontsize=8)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _maps(cells: Sequence[Any], picture: Any, reach: tuple[float, float], shown: Sequence[Any]) -> None:
    """A feature's strength over the picture, and its colours beneath."""
    height, width = picture.shape[:2]
    strength, colours = shown
    covered = (0, width * reach[1], height * reach[0], 0)
    cells[0].imshow(picture, cmap="gray", extent=(0, width, height, 0))
    cells[0].imshow(strength, cmap="inferno", alpha=0.7, extent=covered)
    cells[1].imshow(colours, extent=covered)
    for cell in cells:
        cell.set(xlim=(0, width), ylim=(height, 0))


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
