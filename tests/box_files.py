"""Small data sets with boxes in each format, of bright squares in dark pictures."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, SQUARE = 64, 24
CLASSES = ("dim", "bright")


def picture(place: Path, seed: int) -> list[tuple[int, int, int]]:
    """Saves a picture of two squares; gives left, top and class of each."""
    random = np.random.default_rng(seed)
    canvas = random.integers(0, 40, (SIDE, SIDE, 3))
    squares = []
    for half in range(2):
        left, top = int(random.integers(0, 8)) + 32 * half, int(random.integers(0, SIDE - SQUARE))
        kind = int(random.integers(2))
        canvas[top : top + SQUARE, left : left + SQUARE] = 120 + 120 * kind
        squares.append((left, top, kind))
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas.astype(np.uint8)).save(place)
    return squares


def coco(root: Path, counts: dict[str, int], ids=(7, 3)) -> Path:
    """`SPLIT.json` and `SPLIT/`; category ids are sparse and not in the order of the names."""
    for split, count in counts.items():
        images, boxes = [], []
        for i in range(count):
            image = {"id": 100 + i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE}
            images.append(image)
            for left, top, kind in picture(root / split / f"{i}.png", 1000 * len(split) + i):
                box = [left, top, SQUARE, SQUARE]
                boxes.append({"id": len(boxes), "image_id": 100 + i, "category_id": ids[kind], "bbox": box})
        categories = [{"id": k, "name": n} for k, n in zip(ids, CLASSES, strict=True)]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def voc(root: Path, counts: dict[str, int]) -> Path:
    """`Annotations`, `JPEGImages` and `ImageSets/Main`; coordinates count from 1."""
    for split, count in counts.items():
        names = [f"{split}{i}" for i in range(count)]
        for i, name in enumerate(names):
            squares = picture(root / "JPEGImages" / f"{name}.png", 1000 * len(split) + i)
            objects = "".join(
                f"<object><name>{CLASSES[kind]}</name><difficult>0</difficult><bndbox><xmin>{left + 1}</xmin>"
                f"<ymin>{top + 1}</ymin><xmax>{left + SQUARE}</xmax><ymax>{top + SQUARE}</ymax></bndbox>"
                "</object>"
                for left, top, kind in squares
            )
            place = f"<path>/etc/passwd</path><filename>../{name}.jpg</filename>"
            text = f"<annotation>{place}{objects}</annotation>"
            (root / "Annotations").mkdir(exist_ok=True)
            (root / "Annotations" / f"{name}.xml").write_text(text)
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def yolo(root: Path, counts: dict[str, int], description: bool = True) -> Path:
    """`images/SPLIT`, `labels/SPLIT`, and a `data.yaml` whose path is another machine's."""
    for split, count in counts.items():
        for i in range(count):
            squares = picture(root / "images" / split / f"{i}.png", 1000 * len(split) + i)
            half, side = SQUARE / 2, SQUARE / SIDE
            lines = [f"{k} {(x + half) / SIDE} {(y + half) / SIDE} {side} {side}" for x, y, k in squares]
            (root / "labels" / split).mkdir(parents=True, exist_ok=True)
            (root / "labels" / split / f"{i}.txt").write_text("\n".join(lines))
    if description:
        places = "".join(f"{split}: ../images/{split}\n" for split in counts)
        (root / "data.yaml").write_text(f"path: /home/you/data\n{places}names: {list(CLASSES)}\n")
    return root
