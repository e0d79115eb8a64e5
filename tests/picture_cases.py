"""Pictures painted for tests, and what is made of them."""

import pytest
from PIL import Image

from diffkd.data.base import builder
from diffkd.errors import UserError

RED, GREEN = (250, 10, 10), (10, 250, 10)


def paint(path, colour=RED, size=(12, 10), mode="RGB", **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, colour)
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    picture.save(path, **save)
    return path


def tree(root, *, classes=("cat", "dog"), count=4, colours=(RED, GREEN)):
    for name, colour in zip(classes, colours, strict=False):
        for i in range(count):
            paint(root / name / f"{i}.png", colour)
    return root


def build(root, name="folder", **options):
    return builder(name)(str(root), **{"image_size": 8, **options})


def error(root, name="folder", **options):
    with pytest.raises(UserError) as caught:
        build(root, name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
