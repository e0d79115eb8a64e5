"""Small streets to segment: pictures whose colours tell the classes, and their masks."""

import numpy as np
from PIL import Image

COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (190, 190, 60)]


def scene(random, size=(32, 48), classes=3):
    """A picture `(H, W, 3)` and its mask `(H, W)`: class 0 with a rectangle of every other class."""
    height, width = size
    mask = np.zeros(size, np.uint8)
    for label in range(1, classes):
        top, left = random.integers(0, height // 2), random.integers(0, width // 2)
        mask[top : top + height // 2, left : left + width // 3] = label
    picture = np.array(COLOURS)[mask] + random.integers(-30, 30, (*size, 3))
    mask[0, :5] = 255
    return picture.clip(0, 255).astype(np.uint8), mask


def save(place, array):
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(place)


def street(root, splits=("train", "val"), count=6, **how):
    """A folder of `images` and `masks`, split so."""
    random = np.random.default_rng(0)
    for split in splits:
        for i in range(count):
            picture, mask = scene(random, **how)
            save(root / "images" / split / f"{i}.jpg", picture)
            save(root / "masks" / split / f"{i}.png", mask)
    return root
