"""Which format of boxes a folder holds, and where its splits are."""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from diffkd.errors import UserError, first_line
from diffkd.pictures.boxes import coco, voc, yolo
from diffkd.pictures.boxes.annotations import Annotated, existing
from diffkd.pictures.decoding import ENDINGS
from diffkd.pictures.options import quoted
from diffkd.pictures.rows import text_of
from diffkd.pictures.splits import TEST_NAMES, TRAIN_NAMES, kinds_of

Format = Literal["auto", "coco", "voc", "yolo"]
_XML_FOLDERS = ("Annotations", "annots", "annotations", "xml", "xmls", "labels")
_PICTURE_FOLDERS = ("JPEGImages", "images", "Images", "imgs", "pictures")


@dataclass(frozen=True)
class Found:
    """Splits of a folder, not yet read.

    Attributes:
        what: the format and where it was found, for the user.
        splits: what reads each split, by its name; "" where there is no split.
    """

    what: str
    splits: dict[str, Callable[[], Annotated]]


def find(root: Path, wanted: Format = "auto") -> Found:
    """The boxes in a folder.

    Raises:
        UserError: there are none of that format, or of any.
    """
    seekers = {"yolo": _with_yaml, "coco": _coco, "voc": _voc, "text": _text}
    if wanted == "yolo":
        found = _with_yaml(root) or _text(root)
        return _told(found, root, "YOLO text files")
    if wanted != "auto":
        return _told(seekers[wanted](root), root, "COCO JSON" if wanted == "coco" else "VOC XML")
    for seek in seekers.values():
        found = seek(root)
        if found is not None:
            return found
    raise UserError(
        f"'{root}' holds no boxes: neither COCO JSON, nor VOC XML, nor YOLO text files; "
        "data.format says which it should be"
    )


def _told(found: Found | None, root: Path, what: str) -> Found:
    if found is None:
        raise UserError(f"no {what} in '{root}'")
    return found


# --- COCO ------------------------------------------------------------------------------------------


def _coco(root: Path) -> Found | None:
    every = coco.candidates(root)
    places = [place for place in every if coco.is_instances(place)]
    if not places:
        return None
    splits: dict[str, Callable[[], Annotated]] = {}
    for place in places:
        name = _split_of(place, root)
        if name in splits:
            raise UserError(
                f"'{root}': which file is for '{name or 'all'}'? {quoted([p.name for p in places])}"
            )
        splits[name] = _later(coco.read, place, _pictures_of(place, name, root))
    what = f"COCO JSON ({quoted([p.name for p in places], 4)})"
    others = [p.name for p in every if p not in places and _split_of(p, root) not in ("", *splits)]
    what += f"; {quoted(others, 4)} {'are' if len(others) > 1 else 'is'} none, and left out" * bool(others)
    if "" in splits and "train" in splits:
        del splits[""]
        what += f": {quoted([p.name for p in places if not _split_of(p, root)])} is of no split, and left out"
    return Found(what, splits)


def _later(read: Callable[..., Annotated], *args: Any) -> Callable[[], Annotated]:
    return lambda: read(*args)


def _split_of(place: Path, root: Path) -> str:
    """Which split a file's name or folder means."""
    text = place.stem.lower() + " " + ("" if place.parent == root else place.parent.name.lower())
    for name in ("train", "validation", "valid", "val", "test"):
        if name in text:
            return name
    return ""


def _pictures_of(place: Path, split: str, root: Path) -> Path:
    """The folder of a JSON's pictures: next to it, or named after the split."""
    beside = [place.parent / place.stem, place.parent]
    named = [p for p in sorted(root.iterdir()) if p.is_dir() and split and p.name.lower().startswith(split)]
    shared = [root / name for name in _PICTURE_FOLDERS]
    inner = [folder / split for folder in shared] if split else []
    for folder in (*named, *inner, *beside, *shared, root):
        if folder.is_dir() and any(p.suffix.lower() in ENDINGS for p in folder.iterdir()):
            return folder
    return root


# --- VOC -------------------------------------------------------------------------------------------


def _voc(root: Path) -> Found | None:
    own = {name: p for name, p in _split_places(root).items() if _xml_folder(p) is not None}
    if own:
        splits = {n: _later(voc.read, _xml_folder(p), _picture_folder(p)) for n, p in own.items()}
        return Found(f"VOC XML ({quoted(list(own), 4)})", splits)
    annotations = _xml_folder(root)
    if annotations is None:
        return _voc_in_kinds(root)
    pictures = _picture_folder(root)
    names = voc.split_names(root)
    if "trainval" in names and "test" in names:
        names = {"train": names["trainval"], "test": names["test"]}
    names.pop("trainval", None)
    splits = {name: _later(voc.read, annotations, pictures, listed) for name, listed in names.items()}
    return Found(
        f"VOC XML ('{annotations.name}', pictures in '{pictures.name}')",
        splits if "train" in splits else {"": _later(voc.read, annotations, pictures)},
    )


def _voc_in_kinds(root: Path) -> Found | None:
    """Splits in a folder of annotations and of the same names in one of pictures."""
    for annotations in (root / name for name in _XML_FOLDERS):
        found = _split_places(annotations) if annotations.is_dir() else {}
        for pictures in (root / name for name in _PICTURE_FOLDERS if (root / name).is_dir()):
            splits = {
                name: _later(voc.read, place, pictures / place.name)
                for name, place in found.items()
                if (pictures / place.name).is_dir() and next(place.glob("*.xml"), None) is not None
            }
            if "train" in splits:
                return Found(f"VOC XML ('{annotations.name}', pictures in '{pictures.name}')", splits)
    return None


def _split_places(folder: Path) -> dict[str, Path]:
    """Folders of splits, by the splits' usual names."""
    found = kinds_of(folder)
    kinds = {kind: "train" if kind in TRAIN_NAMES else kind for kind in (*TRAIN_NAMES, *TEST_NAMES)}
    return {name: folder / found[kind] for kind, name in kinds.items() if kind in found}


def _xml_folder(root: Path) -> Path | None:
    for folder in (*(root / name for name in _XML_FOLDERS), root):
        if folder.is_dir() and next(folder.glob("*.xml"), None) is not None:
            return folder
    return None


def _picture_folder(root: Path) -> Path:
    folders = (*(root / name for name in _PICTURE_FOLDERS), root)
    return next(
        (f for f in folders if f.is_dir() and any(p.suffix.lower() in ENDINGS for p in f.iterdir())), root
    )


# --- YOLO ------------------------------------------------------------------------------------------


def _with_yaml(root: Path) -> Found | None:
    for place, content in _descriptions(root):
        if "train" in content:
            return _from_yaml(place, content)
    return None


def _descriptions(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Files that name classes, and what is in them."""
    for place in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        try:
            text = text_of(place)
            content, texts = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)
        except Exception as error:  # a value such as 2026-11-31 raises nearly anything
            raise UserError(f"cannot read '{place}': {first_line(error)}") from error
        if isinstance(content, dict) and "names" in content:
            yield place, content | {"names": texts["names"]}  # `no` is a name, not false


def _from_yaml(place: Path, content: dict[str, Any]) -> Found:
    classes = _names(place, content["names"])
    if "nc" in content and content["nc"] != len(classes):
        raise UserError(f"'{place}': nc is {content['nc']}, but there are {len(classes)} names")
    # a path that does not exist here is another machine's: the folder itself is meant
    base = place.parent / str(content.get("path") or ".")
    base = base if base.is_dir() and (base / str(content["train"])).exists() else place.parent
    points = _points(place, content.get("kpt_shape"))
    splits = {}
    for name in ("train", *TEST_NAMES):
        told = content.get(name)
        parts = [told] if isinstance(told, str) else told or []
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise UserError(f"'{place}': {name} must be a folder, a file of paths, or a list of such")
        if parts:
            splits[name] = _later(_yolo_splits, place, base, parts, classes, points)
    return Found(f"YOLO ('{place.name}')", splits)


def _names(place: Path, names: Any) -> tuple[str, ...]:
    """The classes, of a list or a mapping from their numbers."""
    if isinstance(names, dict):
        numbered = {str(key): name for key, name in names.items()}
        if set(numbered) != {str(k) for k in range(len(names))}:
            raise UserError(f"'{place}': names must number the classes from 0 without gaps")
        names = [numbered[str(k)] for k in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"'{place}': names must be a list of the classes, or number them from 0")
    return tuple(str(name) for name in names)


def _points(place: Path, shape: Any) -> int:
    """Numbers of each box's keypoints, of how many points of how many numbers."""
    if shape is None:
        return 0
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise UserError(f"'{place}': kpt_shape must be [points, numbers of each], such as [17, 3]")
    return int(shape[0] * shape[1])


def _yolo_splits(
    place: Path, base: Path, told: list[str], classes: tuple[str, ...], points: int
) -> Annotated:
    """The pictures of all that a split names."""
    parts = [_yolo_split(place, base, name, classes, points) for name in told]
    if len(parts) == 1:
        return parts[0]
    shared = Path(os.path.commonpath([part.folder for part in parts]))
    return functools.reduce(lambda whole, part: whole.joined(part, shared), parts)


def _yolo_split(place: Path, base: Path, told: str, classes: tuple[str, ...], points: int) -> Annotated:
    inside = told.replace("\\", "/")
    while inside.startswith("../"):
        inside = inside[3:]
    where = next((p for p in (base / told, base / inside) if p.exists()), None)
    if where is None:
        raise UserError(f"'{place}' names '{told}', which is not in '{base}'")
    if where.is_dir():
        return yolo.read(where, _labels_of(where), classes, points=points)
    lines = (line.strip().replace("\\", "/") for line in _lines(where))
    listed = [line.removeprefix("./") for line in lines if line]
    pictures = base / "images" if (base / "images").is_dir() else base
    names = {line.rpartition("images/")[2] for line in listed}
    return yolo.read(pictures, _labels_of(pictures), classes, names, points)


def _lines(place: Path) -> list[str]:
    try:
        return text_of(place).splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{place}': {first_line(error)}") from error


def _labels_of(pictures: Path) -> Path:
    """`labels` in the place of the path's last `images`; else the pictures' own folder."""
    parts = list(pictures.parts)
    for i in range(len(parts) - 1, -1, -1):
        if parts[i] in _PICTURE_FOLDERS:
            folder = Path(*parts[:i], "labels", *parts[i + 1 :])
            if folder.is_dir():
                return folder
    return pictures


def _text(root: Path) -> Found | None:
    """Folders of pictures and text files without a description of the classes."""
    classes = _listed_classes(root)
    splits: dict[str, Callable[[], Annotated]] = {}
    inner = [root / name for name in _PICTURE_FOLDERS if (root / name).is_dir()]
    places = [item for folder in inner for item in _split_places(folder).items()]
    places += [(name, p / "images") for name, p in _split_places(root).items()]
    for name, folder in (*places, *_split_places(root).items()):
        labels = _labels_of(folder)
        if name not in splits and folder.is_dir() and _has_boxes(labels):
            splits[name] = _later(yolo.read, folder, labels, classes)
    if "train" not in splits:
        folder = root / "images" if (root / "images").is_dir() else root
        labels = _labels_of(folder)
        if not _has_boxes(labels) or not any(p.lower().endswith(ENDINGS) for p in existing(folder)):
            return None
        splits = {"": _later(yolo.read, folder, labels, classes)}
    return Found("YOLO text files", splits)


def _has_boxes(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    lists = ("classes", "train", "val", "test", "README")
    names = (p for p in folder.glob("*.txt") if p.stem not in lists and p.is_file())
    first = next(names, None)
    if first is None or folder.name == "labels" or "labels" in folder.parent.parts[-1:]:
        return first is not None
    words = first.read_text(errors="replace").split()
    return not words or words[0].replace(".", "").isdigit()


def _listed_classes(root: Path) -> tuple[str, ...]:
    for place, content in _descriptions(root):
        return _names(place, content["names"])
    for place in (root / "classes.txt", root / "labels" / "classes.txt", root / "obj.names"):
        if place.is_file():
            return tuple(line.strip() for line in _lines(place) if line.strip())
    return ()
