"""A student's answers for picture files: tables, label maps, boxes drawn."""

import csv
import glob
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from diffkd.errors import UserError
from diffkd.pictures.scan import Scan
from diffkd.runs.console import Reporter
from diffkd.runs.disk import cell, write_atomically
from diffkd.tasks.classification import Classification
from diffkd.tasks.detection import Detection
from diffkd.tasks.segmentation import Segmentation
from diffkd.use.drawing import draw_boxes, legend, overlay, palette, picture_of, rgb
from diffkd.use.student import Student, load_student
from diffkd.use.words import told_options

BATCH = 16
_TOLD = 10  # answers on the screen
_SIDES = 240, 1280  # pixels of a picture with boxes


@dataclass(frozen=True)
class Predicted:
    """What `predict` did.

    Attributes:
        rows: an answer per picture, as plain values.
        unreadable: pictures that could not be read, and why.
        output: the folder with all that was written.
    """

    rows: tuple[dict[str, Any], ...]
    unreadable: tuple[str, ...]
    output: Path


def find_pictures(words: Sequence[str]) -> list[Path]:
    """Files, all pictures beneath folders, and what patterns such as `photos/*.jpg` stand for.

    Raises:
        UserError: a word stands for no picture.
    """
    found: dict[Path, None] = {}
    for word in words:
        place = Path(word).expanduser()
        if place.is_dir():
            pictures = [place / path for path in Scan(place).pictures("")]
        else:
            pictures = [place] if place.exists() else [Path(p) for p in sorted(glob.glob(str(place)))]  # noqa: PTH207
        if not pictures:
            raise UserError(f"'{word}': no such picture, nor a folder with pictures")
        found |= dict.fromkeys(pictures)
    return list(found)


def predict(
    run: str,
    words: Sequence[str],
    output: str | None = None,
    top: int = 5,
    threshold: float = 0.3,
    *,
    which: Literal["last", "best"] = "last",
    trust: bool = False,
) -> Predicted:
    """Answers of a run's student for picture files, prepared just as its test data was.

    Writes `predictions.json` and, by task: classification `predictions.csv`; segmentation a label map and
    an overlay for each picture, and `classes.png`, which says what the colours mean; detection
    `predictions.json` in COCO's format and pictures with their boxes.

    Args:
        run: a run folder, or a student's.
        words: files, folders, patterns.
        output: the folder to write to; None is `predictions/` in the run folder.
        top: classes to name for each picture (classification).
        threshold: least score of a box that is drawn (detection); all of them are written.
        which: of a run folder's students, as in `load_student`.
        trust: runs the code that the run names, as in `load_student`.

    Raises:
        UserError: there is no such student or picture, no class is asked for, the threshold is no score, or
            the folder cannot be written to.
    """
    if top < 1:
        raise UserError(f"top={top}: needs at least 1")
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold={threshold}: needs 0 to 1")
    student = load_student(run, trust=trust, which=which)
    places = find_pictures(words)
    folder = Path(output or Path(run) / "predictions")
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write = _writer(student, folder, file_names(places), top, threshold)
    rows: list[dict[str, Any]] = []
    unreadable: list[str] = []
    reporter = Reporter(what="pictures")
    with reporter.bar(len(places)) as bar:
        for found in _batches(student.to(device), places, unreadable):
            answers = student.predict([image for _, image, _ in found])
            for (place, image, size), answer in zip(found, _each(student, answers), strict=True):
                rows.append({"picture": str(place), **write(place, image, size, answer)})
            bar.step(len(found), len(found))
            bar.show("", {})
    _finish(student, folder, rows)
    return Predicted(tuple(rows), tuple(unreadable), folder)


def predict_words(run: str, words: Sequence[str]) -> tuple[str, ...]:
    """`predict` with a command line's words; prints what was written, and gives what could not be read.

    Raises:
        UserError: an option's value cannot be understood.
    """
    options, pictures = told_options(words, ("output", "top", "threshold", "which", "trust"))
    try:
        top, threshold = int(options.get("top", "5")), float(options.get("threshold", "0.3"))
    except ValueError:
        raise UserError("top=5 and threshold=0.3 need numbers") from None
    which, trust = options.get("which", "last"), options.get("trust") == "true"
    done = predict(run, pictures, options.get("output"), top, threshold, which=which, trust=trust)  # type: ignore[arg-type]
    told = [row for row in done.rows if "class" in row]
    for row in told[:_TOLD]:
        print(f"{row['picture']}: {row['class']} ({100 * row['probability']:.1f} %)")
    if len(told) > _TOLD:
        print(f"and {len(told) - _TOLD:,} more in {done.output / 'predictions.csv'}")
    if any("overlay" in row for row in done.rows):
        print("a label map and an overlay for each; classes.png says which colour is which class")
    scores = [box["score"] for row in done.rows for box in row.get("boxes", ())]
    if scores:
        sure = sum(score >= threshold for score in scores)
        print(f"{sure:,} boxes of score {threshold:g} or more are drawn, of {len(scores):,} found")
    count = f"{len(done.rows)} picture{'s' * (len(done.rows) != 1)}"
    print(f"{count}, {len(done.unreadable)} unreadable: {done.output}")
    return done.unreadable


Read = tuple[Path, Tensor, tuple[int, int]]


def _batches(student: Student, places: Sequence[Path], unreadable: list[str]) -> Iterator[list[Read]]:
    """Pictures as the model sees them, with the sizes `(H, W)` of the originals."""
    waiting: list[Read] = []
    for place in places:
        try:
            picture = student.decoded(place, str(place))
        except UserError as error:
            unreadable.append(str(error))
            continue
        waiting.append((place, student.view(picture), (picture.height, picture.width)))
        if len(waiting) == BATCH:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _each(student: Student, answers: Any) -> list[Any]:
    """The task's answers, one per picture."""
    if isinstance(student.task, Segmentation):
        return list(student.task.answers(answers))
    return list(answers)


def _writer(
    student: Student, folder: Path, files: Mapping[Path, str], top: int, threshold: float
) -> Callable[..., dict[str, Any]]:
    names = student.class_names
    if isinstance(student.task, Classification):
        independent = student.task.independent
        return lambda place, image, size, scores: _classes(scores, names, top, independent)
    if isinstance(student.task, Segmentation):
        return lambda place, image, size, labels: _map(folder / files[place], image, labels, names)
    if isinstance(student.task, Detection):

        def draw(
            place: Path, image: Tensor, size: tuple[int, int], found: dict[str, Tensor]
        ) -> dict[str, Any]:
            picture = student.decoded(place, str(place))  # once more: a batch of them would fill the memory
            return _boxes(folder / files[place], picture, image, found, names, threshold)

        return draw
    return lambda place, image, size, answer: {"answer": _plain(answer)}


def _classes(scores: Tensor, names: Sequence[str], top: int, independent: bool) -> dict[str, Any]:
    shares = scores.float().sigmoid() if independent else scores.float().softmax(0)
    shares, order = shares.sort(descending=True)
    best = [
        {"class": names[i], "probability": round(p, 6)}
        for i, p in zip(order[:top].tolist(), shares[:top].tolist(), strict=True)
    ]
    found = {"class": best[0]["class"], "probability": best[0]["probability"], "top": best}
    if independent:
        found["classes"] = [names[i] for i in order[shares >= 0.5].tolist()]
    return found


def _map(place: Path, image: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Writes the label map (value i is class i) and the picture under its colours."""
    labels = labels.cpu().to(torch.uint8)
    colours = palette(len(names))
    mask, covered = (place.with_name(f"{place.name}-{what}.png") for what in ("labels", "overlay"))
    plain = Image.fromarray(labels.numpy(), mode="P")
    plain.putpalette(colours.flatten().tolist())
    write_atomically(mask, lambda partial: plain.save(partial, format="png"))
    _save(overlay(rgb(image), labels, colours), covered)
    share = labels.flatten().bincount(minlength=len(names)).double() / labels.numel()
    shares = {name: round(s, 6) for name, s in zip(names, share.tolist(), strict=True) if s > 0}
    return {"labels": mask.name, "overlay": covered.name, "shares": shares}


def _boxes(
    place: Path,
    original: Image.Image,
    image: Tensor,
    found: dict[str, Tensor],
    names: Sequence[str],
    threshold: float,
) -> dict[str, Any]:
    """Writes the picture with its boxes, which are in pixels of the original."""
    height, width = original.height, original.width
    scale = torch.tensor([width, height, width, height]) / torch.tensor([*image.shape[:0:-1]] * 2)
    boxes, scores, labels = (found[key].cpu() for key in ("boxes", "scores", "labels"))
    boxes, sure = boxes * scale, scores >= threshold
    shown = draw_boxes(original, boxes[sure], labels[sure], names, scores[sure], sides=_SIDES)
    picture = place.with_name(f"{place.name}-boxes.png")
    _save(shown, picture)
    answers = [
        {"box": [round(edge, 2) for edge in box], "class": names[label], "score": round(score, 6)}
        for box, label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True)
    ]
    return {"boxes": answers, "picture with boxes": picture.name, "height": height, "width": width}


def _finish(student: Student, folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    content: Any = list(rows)
    if isinstance(student.task, Detection):
        content = _coco(rows, student.class_names)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(
        folder / "predictions.json",
        lambda place: place.write_text(text, encoding="utf-8", errors="backslashreplace"),
    )
    if isinstance(student.task, Classification):
        write_atomically(folder / "predictions.csv", lambda place: _table(place, rows))
    if isinstance(student.task, Segmentation):
        _save(legend(student.class_names), folder / "classes.png")


def _table(place: Path, rows: Sequence[dict[str, Any]]) -> None:
    with place.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        most = max((len(row["top"]) for row in rows), default=0)
        ranks = [f"{what}_{i + 1}" for i in range(most) for what in ("class", "probability")]
        writer.writerow(["picture", *ranks])
        for row in rows:
            values = (value for best in row["top"] for value in best.values())
            writer.writerow(map(cell, (row["picture"], *values)))


def _coco(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Boxes in COCO's format: left, top, width, height; categories from 1."""
    number = {name: i + 1 for i, name in enumerate(names)}
    pictures: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        pictures.append(
            {"id": i, "file_name": row["picture"], "height": row["height"], "width": row["width"]}
        )
        for found in row["boxes"]:
            left, top, right, bottom = found["box"]
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": i,
                    "category_id": number[found["class"]],
                    "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
                    "score": found["score"],
                }
            )
    categories = [{"id": i, "name": name} for name, i in number.items()]
    return {"images": pictures, "categories": categories, "annotations": boxes}


def file_names(places: Sequence[Path]) -> dict[Path, str]:
    """Names, without an ending, for what is written about pictures: no two are alike.

    A name has one folder, or as many as tell a picture from the others, and the ending where these do not.

    >>> list(file_names([Path("a/1/x.png"), Path("b/1/x.png"), Path("b/1/x.jpg"), Path("y.png")]).values())
    ['a-1-x', '1-x.png', '1-x.jpg', 'y']
    """
    parts = {p: [part for part in p.parts if part not in (p.anchor, "..")] for p in places}
    found: dict[Path, str] = {}
    for short in (True, False):
        left = [place for place in places if place not in found]
        for count in range(2, max(map(len, parts.values()), default=0) + 2):
            names = {p: "-".join(_shown(p, parts[p], short)[-count:]) for p in left if p not in found}
            taken = Counter(name.lower() for name in (*names.values(), *found.values()))
            found |= {p: name for p, name in names.items() if taken[name.lower()] == 1}
    numbered = {p: f"{number:04d}-{p.stem}" for number, p in enumerate(places) if p not in found}
    return {place: (found | numbered)[place] for place in places}


def _shown(place: Path, parts: Sequence[str], short: bool) -> list[str]:
    return [*parts[:-1], place.stem if short else place.name]


def _save(picture: Tensor, place: Path) -> None:
    shown = picture_of(picture)
    write_atomically(place, lambda partial: shown.save(partial, format="png"))


def _plain(answer: Any) -> Any:
    if isinstance(answer, Tensor):
        return answer.tolist()
    if isinstance(answer, dict):
        return {key: _plain(value) for key, value in answer.items()}
    return [_plain(value) for value in answer] if isinstance(answer, list | tuple) else answer
