"""YOLO's text files: one a picture, a line a box, in shares of the picture's sides."""

from collections.abc import Iterator
from pathlib import Path

from diffkd.errors import UserError
from diffkd.pictures.boxes.annotations import Annotated, Collected, check_absent, existing
from diffkd.pictures.decoding import ENDINGS
from diffkd.pictures.rows import text_of

_MOST_CLASSES = 10_000  # that no file names
_KEYPOINTS = "data.yaml needs kpt_shape: [NUMBER, 2 or 3]"


def read(
    pictures: Path, labels: Path, classes: tuple[str, ...], names: set[str] | None = None, points: int = 0
) -> Annotated:
    """Boxes of `NAME.txt` in a folder and pictures of the same names in another, or the same one.

    A line is a class and centre, width and height, and perhaps keypoints, which are left out; or a class and
    a polygon, of which the box is taken.

    Args:
        pictures: folder of pictures.
        labels: folder of text files.
        classes: their names; empty numbers them.
        names: paths of the split's pictures in the folder; None takes all.
        points: numbers of a box's keypoints.

    Raises:
        UserError: a line cannot be read, or is in pixels, or of an unknown class; a picture of the split is
            not there.
    """
    files = sorted(p for p in existing(pictures) if p.lower().endswith(ENDINGS))
    if names is not None:
        check_absent(sorted(names - set(files)), len(names), f"the list of '{pictures.name}'", pictures)
        files = [p for p in files if p in names]
    texts = {p[: -len(".txt")] for p in existing(labels) if p.endswith(".txt")}
    source = f"'{labels.name}'" if labels.name == "labels" else f"'{labels.parent.name}/{labels.name}'"
    found = Collected(source, pictures, relative=True)
    highest, polygons, like_points = -1, 0, True
    lonely = texts - {"classes", "labels", "obj", "train", "val", "test"}
    for path in files:
        stem = path.rpartition(".")[0]
        rows = list(_rows(labels / f"{stem}.txt", points)) if stem in texts else []
        lonely.discard(stem)
        polygons += sum(polygon is not None for _, _, polygon in rows)
        like_points &= all(_like_points(polygon) for _, _, polygon in rows if polygon)
        highest = max([highest, *(kind for kind, _, _ in rows)])
        found.add(path, (0, 0), [[*box, kind, 0.0, float("nan")] for kind, box, _ in rows])
    if classes and highest >= len(classes):
        raise UserError(f"{source}: a box has class {highest}, but there are {len(classes)} class names")
    if highest > _MOST_CLASSES:
        raise UserError(f"{source}: a box has class {highest}; name the classes, or number them from 0")
    notes = []
    without = sum(p.rpartition(".")[0] not in texts for p in files)
    if files and without == len(files):
        raise UserError(f"no text file in '{labels}' has the name of a picture in '{pictures}'")
    if without:
        notes.append(f"{source}: {without} pictures have no text file and count as negatives")
    if lonely and names is None:
        some = f"{len(lonely)} text files without a picture left out"
        notes.append(f"{source}: {some}, such as '{min(lonely)}.txt'")
    if polygons:
        told = f"{source}: {polygons} polygons, of which the boxes around them are taken"
        notes.append(told + f" (if they are boxes with keypoints, {_KEYPOINTS})" * like_points)
    return found.finish(classes or tuple(str(k) for k in range(highest + 1)), notes)


def _like_points(values: list[float]) -> bool:
    """Whether numbers may be a box and points in it, not a polygon."""
    (x, y, width, height), across, down = values[:4], values[4::2], values[5::2]
    inside = all(abs(a - x) <= width / 2 or not a for a in across)  # 0 is of a point that is not seen
    return inside and all(abs(b - y) <= height / 2 or not b for b in down)


def _rows(place: Path, points: int) -> Iterator[tuple[int, list[float], list[float] | None]]:
    """Class, corners in shares of the sides, and the polygon that it was, of every line of a file."""
    try:
        lines = text_of(place).splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read labels '{place}': {error}") from error
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        where = f"'{place}', line {number}"
        try:
            kind, values = int(words[0].removesuffix(".0")), [float(word) for word in words[1:]]
        except ValueError as error:
            raise UserError(f"{where}: '{line}' is no class and numbers") from error
        if kind < 0:
            raise UserError(f"{where}: class {kind}; classes count from 0")
        if points and len(values) == 4 + points:
            values = values[:4]
        if not (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)):
            raise UserError(
                f"{where}: {len(words)} words; a line is a class and centre, width and height, or a polygon; "
                f"for boxes with keypoints {_KEYPOINTS}"
            )
        if max(values) > 2:
            raise UserError(f"{where}: {max(values):g} is no share of a side: are these pixels?")
        if len(values) > 4:
            across, down = values[::2], values[1::2]
            yield kind, [min(across), min(down), max(across), max(down)], values
            continue
        x, y, w, h = values
        yield kind, [x - w / 2, y - h / 2, x + w / 2, y + h / 2], None
