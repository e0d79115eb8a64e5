"""Folders of splits under other names, around and inside of others."""

import unicodedata

import numpy as np
import pytest
from PIL import Image

from diffkd.data.base import builder
from picture_cases import build, error, paint, tree


def sizes(data):
    return data.num_classes, len(data.train), len(data.test)


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val"),
        ("training", "testing"),
        ("train", "Test"),
        ("train", "eval"),
        ("train_images", "test_images"),
    ],
)
def test_splits_go_by_many_names(tmp_path, names):
    for name, count in zip(names, (4, 2), strict=True):
        tree(tmp_path / "archive" / name, count=count)
    data = build(tmp_path)
    assert sizes(data) == (2, 8, 4)
    assert any("holds one folder alone" in note for note in data.notes)


def test_what_looks_like_a_split_may_be_a_class(tmp_path):
    tree(tmp_path, classes=("bus", "train", "Test"), colours=[(1, 2, 3)] * 3)
    assert build(tmp_path).class_names == ("Test", "bus", "train")
    tree(tmp_path / "b", classes=("bullet_train", "test_tube"))
    assert build(tmp_path / "b").class_names == ("bullet_train", "test_tube")


def test_a_folder_beside_the_training_folder_that_is_not_used_is_said(tmp_path):
    tree(tmp_path / "train")
    tree(tmp_path / "extra")
    assert any("beside 'train', 'extra' is not used" in note for note in build(tmp_path).notes)
    assert sizes(build(tmp_path, test_folder="extra")) == (2, 8, 8)
    assert "'nowhere' is not a folder" in error(tmp_path, test_folder="nowhere")


def test_accents_are_one_letter_or_two(tmp_path):
    for split, form in (("train", "NFC"), ("val", "NFD")):
        tree(tmp_path / split, classes=(unicodedata.normalize(form, "café"), "dog"))
    assert sizes(build(tmp_path)) == (2, 8, 8)
    tree(tmp_path / "train", classes=(unicodedata.normalize("NFD", "café"),))
    assert "two folders" in error(tmp_path)


def test_a_class_that_the_held_out_part_lacks_is_said(tmp_path):
    tree(tmp_path)
    paint(tmp_path / "emu" / "0.png")
    assert any("no test picture of class 'emu'" in note for note in build(tmp_path).notes)
    rows = [f"{name}/{i}.png,{name}" for name in ("cat", "dog") for i in range(4)]
    (tmp_path / "train.csv").write_text("\n".join(["path,label", *rows, "emu/0.png,emu"]))
    assert any("no test picture of class 'emu'" in note for note in build(tmp_path, "table").notes)


@pytest.mark.parametrize("inside", ["images/Train", "Train/images", "around/training/images"])
def test_pictures_and_masks_lie_in_either_order(tmp_path, inside):
    for kind in ("images", "masks"):
        for split, other in (("Train", "Val"), ("training", "validation")):
            for name in (split, other) if split in inside else ():
                place = tmp_path / inside.replace(split, name).replace("images", kind)
                for i in range(3):
                    paint(place / f"{i}.png", size=(8, 8))
                    if kind == "masks":
                        Image.fromarray(np.eye(8, dtype=np.uint8)).save(place / f"{i}.png")
    assert sizes(builder("masks")(str(tmp_path))) == (2, 3, 3)
