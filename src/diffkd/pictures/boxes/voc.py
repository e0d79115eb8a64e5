"""Pascal VOC's XML: one file a picture."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from diffkd.errors import UserError
from diffkd.pictures.boxes.annotations import Annotated, Collected, check_absent, existing
from diffkd.pictures.decoding import ENDINGS, regular_size
from diffkd.pictures.options import quoted
from diffkd.pictures.rows import text_of

_MAX_XML = 1 << 22  # bytes: larger ones are no annotations


def read(annotations: Path, pictures: Path, names: Sequence[str] | None = None) -> Annotated:
    """Boxes of XML files in a folder and pictures of the same names in another, or the same one.

    Coordinates count from 1 in VOC and from 0 here. What a file says of its picture's place is not
    trusted: only names count. A picture without a file is a negative where no split lists names.

    Args:
        annotations: folder of `NAME.xml`.
        pictures: folder of `NAME.jpg` or another ending.
        names: those of the split; None takes all.

    Raises:
        UserError: a file is damaged, names no class, or has no picture.
    """
    there = [p for p in sorted(existing(pictures)) if p.lower().endswith(ENDINGS)]
    files = {Path(p).stem: p for p in there}
    written = {p.stem: p for p in sorted(annotations.glob("*.xml"))}
    source = f"'{annotations.name}'"
    wanted = sorted(written.keys() | files.keys()) if names is None else list(names)
    found = Collected(source, pictures)
    absent: list[str] = []
    classes: dict[str, int] = {}
    for name in wanted:
        if name not in files:
            absent.append(name)
            continue
        size, objects = _objects(written[name]) if name in written else ((0, 0), [])
        rows = [
            [*box, classes.setdefault(kind, len(classes)), hard, float("nan")] for kind, box, hard in objects
        ]
        found.add(files[name], size, rows)
    check_absent(absent, len(wanted), source, pictures)
    bare = [name for name in wanted if name not in written]
    alike = [p for p in there if files[Path(p).stem] != p]
    notes = [f"{source}: pictures of one name, of which the last is taken: {quoted(alike)}"] * bool(alike)
    notes += [f"{source}: {len(bare)} pictures have no file there and count as negatives"] * bool(bare)
    read_in = found.finish(list(classes), notes)
    return read_in.relabelled(sorted(classes), source)


def _objects(place: Path) -> tuple[tuple[int, int], list[tuple[str, list[float], float]]]:
    """`(H, W)`, and class, corners and whether it is difficult, of every object of a file."""
    try:
        if regular_size(place) > _MAX_XML or b"<!ENTITY" in (content := place.read_bytes()):
            raise ValueError("too large, or with entities of its own")
        root = ElementTree.fromstring(content)
        size = (
            int(float(root.findtext("{*}size/{*}height") or 0)),
            int(float(root.findtext("{*}size/{*}width") or 0)),
        )
        return size, [_object(part) for part in root.iterfind(".//{*}object")]
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise UserError(f"cannot read annotation '{place}': {error}") from error


def _object(part: ElementTree.Element) -> tuple[str, list[float], float]:
    name = (part.findtext("{*}name") or "").strip()
    if not name:
        raise ValueError("an object without a name")
    corners = [
        float(part.findtext(f"{{*}}bndbox/{{*}}{key}") or "nan") for key in ("xmin", "ymin", "xmax", "ymax")
    ]
    return name, [corners[0] - 1, corners[1] - 1, *corners[2:]], float(part.findtext("difficult") or 0)


def split_names(folder: Path) -> dict[str, list[str]]:
    """Names by split of `ImageSets/Main`, where there is one.

    Raises:
        UserError: a split is empty.
    """
    found = {}
    for split in ("train", "val", "trainval", "test"):
        place = folder / "ImageSets" / "Main" / f"{split}.txt"
        if place.is_file():
            listed = text_of(place).splitlines()
            found[split] = [line.split()[0] for line in listed if line.strip()]
            twice = [name for name, n in Counter(found[split]).items() if n > 1]
            if twice:
                raise UserError(f"'{place}' names {quoted(twice)} twice")
            if not found[split]:
                raise UserError(f"'{place}' is empty")
    return found
