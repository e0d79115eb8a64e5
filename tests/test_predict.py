"""A student answers for pictures: tables, label maps, boxes."""

import csv
import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffkd import Data, DiffKD, Run, load_student
from diffkd.pictures.view import TestView
from diffkd.recipe.schema import load
from diffkd.report.faults.base import write_table
from diffkd.report.faults.sheet import fitted
from diffkd.runs.console import Reporter
from diffkd.tasks.detection import Detection
from diffkd.tasks.segmentation import Segmentation
from diffkd.training.fit import fit
from diffkd.use import predict, visualize
from diffkd.use.drawing import _bright, draw_boxes
from diffkd.use.student import Student

SMALL = ["trainer.max_steps=2", "method=none", "teacher=null", "data.workers=0", "trainer.accelerator=cpu"]


def trained(place, recipe, *words):
    """A run of two steps, for the form of its answers and not for their worth."""
    fit(load(recipe, [*SMALL, f"output={place}", *words]), Reporter(progress=False))
    return place


@pytest.fixture
def pictures(tmp_path):
    """Two pictures in a folder, of different sizes."""
    (tmp_path / "photos").mkdir()
    for name, size in (("a.png", (40, 30)), ("b.jpg", (64, 64))):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def test_classes_of_pictures(diffkd, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "_TOLD", 1)
    run = trained(tmp_path / "run", "digits-8x8")
    status, out, err = diffkd("predict", run, pictures, "top=3", "output=found")
    assert (status, err) == (0, ""), err
    assert f"and 1 more in {Path('found/predictions.csv')}\n2 pictures, 0 unreadable: found\n" in out
    rows = json.loads((tmp_path / "found/predictions.json").read_text())
    student = load_student(run)
    for row in rows:
        scores = student.predict([student.read(row["picture"])])[0].softmax(0)
        assert row["class"] == str(int(scores.argmax()))
        assert row["probability"] == pytest.approx(float(scores.max()), abs=1e-5)
    table = list(csv.DictReader((tmp_path / "found/predictions.csv").open()))
    assert [row["class_1"] for row in table] == [row["class"] for row in rows]
    assert set(table[0]) == {"picture"} | {f"{w}_{i}" for w in ("class", "probability") for i in (1, 2, 3)}


def test_an_unreadable_picture_is_named_and_left_out(diffkd, pictures, tmp_path):
    run = trained(tmp_path / "run", "digits-8x8")
    (pictures / "broken.png").write_bytes(b"no picture")
    status, out, err = diffkd("predict", run, pictures / "*", "output=found")
    assert status == 1
    assert "broken.png" in err
    assert err.count("\n") == 1
    assert "2 pictures, 1 unreadable" in out
    status, _, err = diffkd("predict", run, "nowhere")
    assert (status, "'nowhere': no such picture" in err) == (2, True)
    status, _, err = diffkd("predict", run, pictures, "top=0")
    assert (status, err) == (2, "error: top=0: needs at least 1\n")
    status, _, err = diffkd("predict", run, pictures, "threshold=nan")
    assert (status, err) == (2, "error: threshold=nan: needs 0 to 1\n")


def test_label_maps_of_pictures(diffkd, pictures, tmp_path):
    words = ["data=digit_scenes", "data.kind=segmentation", "data.train_scenes=16", "data.test_scenes=2"]
    run = trained(tmp_path / "run", "masks", *words, "data.batch_size=8", "student=simple/unet4")
    (pictures / "more").mkdir()
    for name, mode in (("a.jpg", "CMYK"), ("more/a.png", "L"), ("more/b.png", "RGBA")):  # equal names
        Image.open(pictures / "a.png").convert(mode).save(pictures / name)
    status, out, err = diffkd("predict", run, pictures, "output=found")
    assert status == 0, err
    assert "classes.png says which colour is which class" in out
    student = load_student(run)
    for row in json.loads((tmp_path / "found/predictions.json").read_text()):
        image = student.read(row["picture"])
        expected = student.predict([image])[0].argmax(0)
        found = np.asarray(Image.open(tmp_path / "found" / row["labels"]))
        assert torch.equal(torch.from_numpy(found.copy()).long(), expected)
        assert Image.open(tmp_path / "found" / row["overlay"]).size == Image.open(row["picture"]).size
        assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-4)
    assert len(list((tmp_path / "found").glob("*-labels.png"))) == 5
    assert (tmp_path / "found/classes.png").is_file()


def test_boxes_of_pictures(diffkd, pictures, tmp_path):
    words = ["data.train_scenes=8", "data.test_scenes=2", "data.batch_size=4"]
    run = trained(tmp_path / "run", "digit-scenes-detection", *words)
    status, out, err = diffkd("predict", run, pictures, "output=found", "threshold=0.0")
    assert status == 0, err
    found = json.loads((tmp_path / "found/predictions.json").read_text())
    count = len(found["annotations"])
    assert not count or f"{count} boxes of score 0 or more are drawn, of {count} found" in out
    assert [image["file_name"] for image in found["images"]] == [
        str(pictures / n) for n in ("a.png", "b.jpg")
    ]
    sizes = {image["id"]: (image["width"], image["height"]) for image in found["images"]}
    assert sizes == {0: (40, 30), 1: (64, 64)}
    for box in found["annotations"]:
        left, top, width, height = box["bbox"]
        assert min(left, top, width, height) >= 0
        assert left + width <= sizes[box["image_id"]][0] + 0.1
        assert top + height <= sizes[box["image_id"]][1] + 0.1
    assert (tmp_path / "found/photos-a-boxes.png").is_file()


class FindsTheBright(nn.Module):
    """A detector of one bright object a picture, with torchvision's contract."""

    def forward(self, images):
        found = []
        for image in images:
            there = image.float().mean(0) > 128
            down, across = there.any(1).nonzero(), there.any(0).nonzero()
            box = torch.stack([across.min(), down.min(), across.max() + 1, down.max() + 1]).float()
            found.append({"boxes": box[None], "scores": torch.ones(1), "labels": torch.tensor([2])})
        return found


def test_boxes_come_back_in_the_pictures_own_pixels(tmp_path, monkeypatch):
    """Pictures that are shrunk, enlarged, and padded to one size in between."""
    expected = {"a.png": (200, 100, [20, 40, 110, 90]), "b.png": (60, 90, [5, 30, 25, 85])}
    for name, (width, height, (left, top, right, bottom)) in expected.items():
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[top:bottom, left:right] = 255
        Image.fromarray(pixels).save(tmp_path / name)
    task = Detection(Data([], [], 2, (3, 64, 96)))
    view = TestView("shortest", (64, 96))
    student = Student(FindsTheBright(), nn.Identity(), view, task, ("dim", "bright"), {})
    assert [tuple(student.read(tmp_path / name).shape) for name in expected] == [(3, 48, 96), (3, 96, 64)]
    monkeypatch.setattr(predict, "load_student", lambda *_, **__: student)
    done = predict.predict("run", [str(tmp_path / name) for name in expected], str(tmp_path / "found"))
    for row, (width, height, box) in zip(done.rows, expected.values(), strict=True):
        assert (row["width"], row["height"]) == (width, height)
        assert row["boxes"][0]["class"] == "bright"
        assert row["boxes"][0]["box"] == pytest.approx(box, abs=2.1)  # a pixel of the smaller picture
        shown = Image.open(tmp_path / "found" / row["picture with boxes"])
        factor = 240 / min(width, height)
        assert shown.size == (round(width * factor), round(height * factor))  # the photo, enlarged
        coloured = np.argwhere(np.ptp(np.asarray(shown), axis=2) > 9)  # the outline, and the words
        left, top, right, bottom = (edge * factor for edge in box)
        assert coloured.max(0) == pytest.approx((bottom, right), abs=2.1 * factor)


def test_the_denoising_is_shown(diffkd, pictures, tiny, tmp_path):
    assert diffkd("distill", "tiny.yaml", "output=run", "trainer.keep=all")[0] == 0
    (pictures / "broken.png").write_bytes(b"no picture")
    status, out, err = diffkd("visualize", "run", pictures)
    assert (status, err) == (1, f"cannot read picture '{pictures / 'broken.png'}': it is no picture\n")
    assert "2 pictures: run/denoising/index.html" in out
    page = (tmp_path / "run/denoising/index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert Image.open(tmp_path / "run/denoising/000-a.png").size[0] > 400
    assert diffkd("visualize", "run", pictures / "a.png", "output=seen/here", "which=best")[0] == 0
    assert (tmp_path / "seen/here/index.html").is_file()
    assert Run("run").visualize(pictures / "a.png", "seen/there").pictures == 1
    status, _, err = diffkd("visualize", "run", pictures, "outptu=a")
    assert (status, err) == (
        2,
        "error: 'outptu=a' is no picture, and no option; did you mean 'output'?\n",
    )
    assert diffkd("train", "tiny.yaml", "output=alone")[0] == 0
    status, _, err = diffkd("visualize", "alone", pictures)
    assert (status, err.count("\n"), "had no teacher" in err) == (2, 1, True)


@pytest.mark.parametrize("kind", [Detection, Segmentation])
def test_features_are_drawn_where_the_picture_lies_in_its_padding(kind):
    task, sizes = kind(Data([], [], 2, (3, 64, 64))), []

    def features(batch):
        size = batch.images.shape[-2:] if batch.valid is None else batch.valid.shape[-2:]
        sizes.append(tuple(size))
        maps = torch.rand(2, 4, *(side // 8 for side in size))
        return {"tap": maps}, {"tap": maps}

    distiller, maps = SimpleNamespace(features=features), {"tap": DiffKD(4, 4).eval()}
    way = visualize._ways(torch.zeros(3, 40, 50, dtype=torch.uint8), task, distiller, maps)["tap"]
    assert sizes == [(64, 64)]
    assert {feature.shape for feature in way.features.values()} == {(4, 5, 7)}
    assert way.reach == pytest.approx((1.0, 56 / 50))
    drawn = visualize._draw(torch.zeros(3, 40, 50, dtype=torch.uint8), {"tap": way})
    assert Image.open(BytesIO(drawn)).width > 400


def test_the_last_step_is_what_is_projected():
    torch.manual_seed(0)
    diffkd, ours, theirs = DiffKD(4, 6, num_steps=3).eval(), torch.rand(2, 4, 5, 5), torch.rand(2, 6, 5, 5)
    torch.manual_seed(1)
    way = diffkd.steps(ours, theirs)
    names = ["student", "with noise", "step 1", "step 2", "step 3", "denoised", "teacher", "gamma"]
    assert list(way) == names
    assert torch.equal(diffkd.projection(way["step 3"]), way["denoised"])
    torch.manual_seed(1)
    assert torch.equal(diffkd(ours, theirs).denoised, way["denoised"])


def test_words_on_boxes_stay_off_each_other_and_on_the_picture():
    boxes = torch.tensor([[150.0, 2, 198, 60], [151, 3, 199, 61], [152, 2, 198, 60]])
    names, scores = ["a" * 20, "b" * 20, "c" * 20], torch.tensor([0.2, 0.9, 0.5])
    picture = Image.new("RGB", (200, 200))
    drawn = draw_boxes(picture, boxes, torch.arange(3), names, scores, sides=(200, 256))
    colours = [torch.tensor(_bright(label), dtype=torch.uint8)[:, None, None] for label in range(3)]
    areas = [int((drawn == colour).all(0).sum()) for colour in colours]
    outline = 2 * (49 + 59)
    assert areas[1] > outline + 500  # the surest is named inside of its box, for above is no room
    assert areas[2] > 500  # the next one below
    assert areas[0] <= outline  # and for the last one there is no place left
    assert (drawn[:, :, 60:100] != 0).any()  # words too long for the place begin further left


def test_odd_names_stay_in_their_place(tmp_path):
    names = ["a\nb", "caf\udce9", "=cmd()", "-1"]
    write_table(tmp_path / "a.csv", [{"name": name} for name in names])
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = [row for (row,) in csv.reader(file)]
    assert rows == ["name", "a\nb", "caf\\udce9", "'=cmd()", "-1"]
    assert [fitted(name, 12, 99) for name in names[:2]] == ["a b", "caf\\xdce9"]
    boxes = torch.tensor([[10.0, 30, 50, 60]]).expand(2, 4)
    drawn = draw_boxes(Image.new("RGB", (64, 64)), boxes, torch.arange(2), names)
    assert drawn.any()
