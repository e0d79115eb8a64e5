"""COCO's JSON: instances with boxes."""

import json
import mmap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffkd.errors import UserError
from diffkd.pictures.boxes.annotations import Annotated, Collected, check_absent, existing, within
from diffkd.pictures.options import quoted
from diffkd.pictures.rows import MARKS, text_of

_KEYS = (b'"images"', b'"annotations"', b'"categories"')
_KINDS = (b'"bbox"', b'"caption"', b'"segments_info"')
_OTHERS = ("keypoint", "caption", "panoptic", "image_info", "stuff")  # what lies beside the instances


def candidates(folder: Path) -> list[Path]:
    """JSON files that may be instances, in the folder and its folders, in order."""
    places = sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])
    places = [p for p in places if p.name[0] != "." and not any(o in p.name.lower() for o in _OTHERS)]
    return [p for p in places if not p.is_dir()]


def is_instances(place: Path) -> bool:
    """Whether a file begins as COCO's instances do, and holds neither captions alone nor segments."""
    if not place.is_file():
        return False
    with place.open("rb") as opened:
        start = opened.read(1 << 16)
        if start[:2] in MARKS:
            start = start.decode("utf-16", "ignore").encode()
            return b'"bbox"' in start and any(key in start for key in _KEYS)
        if start.lstrip()[:1] != b"{" or not any(key in start for key in _KEYS):
            return False
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            boxes, words, segments = (content.find(key) >= 0 for key in _KINDS)
    return not segments and (boxes or not words)


def read(place: Path, folder: Path, *, keep_ids: bool = False) -> Annotated:
    """The pictures and boxes of a file.

    Args:
        place: the JSON.
        folder: where its pictures lie.
        keep_ids: a class's label is its id less one, as COCO's detectors count, with gaps; else classes are
            numbered in the order of their ids.

    Raises:
        UserError: it is no such file, or something in it does not fit together.
    """
    source = f"'{place.name}'"
    content = _content(place, source)
    classes, number = _classes(content["categories"], source, keep_ids)
    images = content["images"]
    known = [_id(image["id"]) for image in images]
    twice = [str(i) for i, n in Counter(known).items() if n > 1]
    if twice:
        raise UserError(f"{source}: two pictures have the id {quoted(twice)}")
    boxes, notes = _boxes(content["annotations"], set(known), number, source)
    there = existing(folder)
    found = Collected(source, folder)
    absent = []
    for key, image in zip(known, images, strict=True):
        path = within(str(image.get("file_name", "")), there)
        if path is None:
            absent.append(str(image.get("file_name")))
            continue
        height, width = (_number(image.get(side) or 0, source, image, side) for side in ("height", "width"))
        found.add(path, (int(height), int(width)), boxes.get(key, []))
    check_absent(absent, len(images), source, folder)
    return found.finish(classes, notes)


def _id(value: Any) -> Any:
    """An id as a whole number where it is one, however it is written.

    >>> _id("12"), _id(12.0), _id("a12")
    (12, 12, 'a12')
    """
    if isinstance(value, str) and value.isascii() and value.isdecimal() and (value == "0" or value[0] != "0"):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _content(place: Path, source: str) -> dict[str, Any]:
    try:
        content = json.loads(text_of(place))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read annotations '{place}': {error}") from error
    keys = ("images", "annotations", "categories")
    lacking = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        raise UserError(f"'{place}' is no COCO instances file: it has no list '{lacking[0]}'")
    for key, ids in (("images", ("id",)), ("annotations", ()), ("categories", ())):
        _check_records(content[key], ids, f"{source}: '{key}'")
    for key in ("id", "image_id", "category_id"):
        known = [record for record in content["annotations"] if record.get(key) is not None]
        _check_records(known, (key,), f"{source}: 'annotations'")
    sample: dict[str, Any] = next(iter(content["annotations"]), {"bbox": []})
    if "bbox" not in sample:
        kind = "captions" if "caption" in sample else "panoptic" if "segments_info" in sample else "no boxes"
        raise UserError(f"'{place}' holds {kind}, not COCO instances with 'bbox'")
    return content  # type: ignore[no-any-return]


def _check_records(records: list[Any], ids: Sequence[str], where: str) -> None:
    """Refuses what is no record, or has no number or word where it needs one."""
    for record in records:
        if not isinstance(record, dict):
            raise UserError(f"{where} holds {record!r:.60}, where records belong")
        for key in ids:
            if not isinstance(record.get(key), int | float | str):
                raise UserError(
                    f"{where} holds a record with the {key} {record.get(key)!r:.60}: {record!r:.80}"
                )


def _number(value: Any, source: str, record: dict[str, Any], key: str) -> float:
    try:
        return float("nan") if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"{source}: the record {record.get('id')!r} has the {key} {value!r:.60}, no number"
        ) from None


def _classes(categories: list[Any], source: str, keep_ids: bool) -> tuple[list[str], dict[int, int]]:
    """Names in the order of the labels, and the label of each id."""
    ids = [_id(category.get("id")) for category in categories]
    if not ids or not all(isinstance(i, int) for i in ids) or len(set(ids)) < len(ids):
        raise UserError(f"{source}: categories need an id each, a whole number that no other has")
    names = {i: str(c.get("name", i)) for i, c in zip(ids, categories, strict=True)}
    if not keep_ids:
        ordered = sorted(names)
        return [names[i] for i in ordered], {i: k for k, i in enumerate(ordered)}
    if min(names) < 1:
        raise UserError(f"{source}: category ids must start at 1 to be kept")
    return [names.get(i, f"({i})") for i in range(1, max(names) + 1)], {i: i - 1 for i in names}


def _boxes(
    annotations: list[Any], pictures: set[Any], number: dict[int, int], source: str
) -> tuple[dict[Any, list[list[float]]], list[str]]:
    """Rows for `Collected.add` by picture, and notes."""
    boxes: dict[Any, list[list[float]]] = {}
    strays = 0
    for a in annotations:
        picture, category = _id(a.get("image_id")), _id(a.get("category_id"))
        if picture not in pictures:
            strays += 1
            continue
        if category not in number:
            raise UserError(
                f"{source}: a box has category {a.get('category_id')!r}, which 'categories' lacks"
            )
        row = a.get("bbox")
        if not isinstance(row, list) or len(row) != 4:
            raise UserError(f"{source}: annotation {a.get('id')!r} has the bbox {row!r}, not four numbers")
        left, top, width, height = (_number(value, source, a, "bbox") for value in row)
        area = _number(a["area"] if isinstance(a.get("area"), int | float) else None, source, a, "area")
        corners = [left, top, left + width, top + height]
        boxes.setdefault(picture, []).append(
            [*corners, number[category], _number(a.get("iscrowd") or 0, source, a, "iscrowd"), area]
        )
    if strays > len(annotations) / 2:
        raise UserError(
            f"{source}: {strays} of {len(annotations)} boxes are of pictures that it does not list: "
            "do pictures and boxes come from two data sets?"
        )
    counted = Counter(a.get("id") for a in annotations if a.get("id") is not None)
    twice = sum(n - 1 for n in counted.values())
    notes = [f"{source}: {strays} boxes of pictures that it does not list left out"] * bool(strays)
    notes += [f"{source}: {twice} annotations have the id of another; all are taken"] * bool(twice)
    return boxes, notes
