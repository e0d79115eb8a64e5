"""Whole runs on pictures with masks: distilled, evaluated, stopped and gone on with."""

import base64
import json
import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from mask_cases import save, scene, street

MODELS = ["teacher=smp/unet:resnet18", "student=smp/unet:tu-mobilenetv3_small_050"]
RUN = ["trainer.accelerator=cpu", "trainer.threads=1", "method.diffkd.num_steps=2", "data.workers=0"]
SHORT = [*MODELS, *RUN, "data.batch_size=3", "trainer.epochs=2"]
UNTRAINED = "teacher.train=null"


def distil(diffkd, root, *words, output="a"):
    status, out, err = diffkd("distill", "masks", f"data.root={root}", *SHORT, f"output={output}", *words)
    assert status == 0, err
    return out, err


def test_a_folder_and_two_names_are_distilled_measured_and_gone_on_with(diffkd, tmp_path, monkeypatch):
    from diffkd.training.trainer import Trainer

    root = street(tmp_path / "straße mit bäumen", splits=("train", "val", "test"))
    _, err = distil(diffkd, root, "teacher.train.epochs=1")
    assert "teacher: training smp/unet:resnet18 once" in err
    assert "tested on 'val', not on 'test'" in err
    assert "0 = 0 " in err
    assert "255 = void" in err
    assert "training views of 32x48" in err
    assert "student decoder (16, 32, 64) <- teacher decoder (16, 32, 64)" in err
    assert "segmentation_head.0 (3, 32, 64)" in err
    status, said, _ = diffkd("evaluate", "a")
    assert status == 0
    assert said.count("as recorded") == 2
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["metric"] == "miou"
    assert len(summary["arrays"]["iou"]) == 3
    assert np.shape(summary["arrays"]["confusion"]) == (3, 3)
    masks = 6 * 32 * 48 - 6 * 5
    assert np.sum(summary["arrays"]["confusion"]) == masks

    step = Trainer._step

    def dies(self, batch, place, updates):
        if place.step == 3:
            raise KeyboardInterrupt
        return step(self, batch, place, updates)

    words = ["distill", "masks", f"data.root={root}", *SHORT, "teacher.train.epochs=1", "output=cut"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", dies)
        status, _, err = diffkd(*words, "trainer.save_every=1")
        assert status != 0
        assert "once" not in err  # the made teacher serves again
    status, _, err = diffkd(*words, "trainer.save_every=1", "resume=true")
    assert status == 0, err
    assert "resumed at epoch 2, step 3" in err
    saved = [(tmp_path / run / "student/model.safetensors").read_bytes() for run in ("a", "cut")]
    assert saved[0] == saved[1]


def test_masks_are_not_mixed(diffkd, tmp_path):
    street(tmp_path / "street", count=3)
    words = ["data.root=street", *SHORT, UNTRAINED, "student=simple/unet4", "teacher=simple/unet4"]
    status, _, err = diffkd("distill", "masks", *words, "data.mixup=0.5", "output=a")
    assert (status, (tmp_path / "a").exists()) == (2, False)
    assert err == "error: data.mixup and data.cutmix need pictures that have one class each; leave them out\n"


def test_binary_masks_of_0_and_255_with_grey_pictures(diffkd, tmp_path):
    random = np.random.default_rng(0)
    for i in range(8):
        picture, mask = scene(random, classes=2)
        save(tmp_path / f"lesions/images/{i}.png", picture.mean(2).astype(np.uint8))
        save(tmp_path / f"lesions/masks/{i}.png", np.where(mask == 1, 255, 0).astype(np.uint8))
    words = ["data.classes=[background,lesion]", "data.val_fraction=0.25", "trainer.max_steps=2", UNTRAINED]
    _, err = distil(diffkd, tmp_path / "lesions", *words)
    assert "0 is 'background', 255 is 'lesion', nothing is void" in err
    assert "2 of its 8 pictures held out" in err
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["class_names"] == ["background", "lesion"]
    assert np.sum(summary["arrays"]["confusion"]) == 2 * 32 * 48


@pytest.mark.parametrize("kind", ["large", "unequal"])
def test_pictures_larger_than_the_views(kind, diffkd, tmp_path):
    root = street(tmp_path / "street", size=(40, 64))
    if kind == "unequal":
        picture, mask = scene(np.random.default_rng(5), size=(50, 40))
        save(root / "images/val/0.jpg", picture)
        save(root / "masks/val/0.png", mask)
    _, err = distil(diffkd, root, "data.crop_size=32", "trainer.max_steps=1", UNTRAINED)
    assert "training views of 32x32 out of pictures of 40x64" in err
    assert "student decoder (16, 32, 32)" in err
    assert "as recorded" in diffkd("evaluate", "a")[1]


def test_the_page_shows_scenes_and_classes(diffkd, tmp_path):
    root = street(tmp_path / "street", splits=("train", "val"))
    words = [f"data.root={root}", *SHORT, "trainer.max_steps=1", "data.classes=[road,<kerb>,car]", UNTRAINED]
    status, _, err = diffkd("compare", "masks", "methods=none,diffkd", "seeds=1", *words, "output=c")
    assert status == 0, err
    page = (tmp_path / "c/report.html").read_text()
    names = ["picture", "truth", "teacher", "none", "diffkd", "where they differ"]
    shown = re.findall(r"<figcaption[^>]*>([^<]*)</figcaption>", page)
    assert shown == names * 3
    assert page.count('src="data:image/png;base64,') == 18
    legend = re.findall(r"background:rgb\(([^)]*)\)\"></span>([^<]*)</span>", page)
    names = ["road", "&lt;kerb&gt;", "car", "void"]
    assert legend == list(zip(["0, 0, 0", "128, 0, 0", "0, 128, 0", "224, 224, 192"], names, strict=True))
    (bars,) = json.loads((tmp_path / "c/comparison.json").read_text())["per_class"]
    iou = json.loads((tmp_path / "c/none-seed0/summary.json").read_text())["arrays"]["iou"]
    assert (bars["figure"], bars["methods"]["none"]) == ("iou", pytest.approx(iou))
    first = base64.b64decode(re.findall(r"base64,([^\"]*)", page)[1])
    truth = np.asarray(Image.open(BytesIO(first)).convert("RGB"))
    mask = np.asarray(Image.open(root / "masks/val/0.png"))
    assert truth.shape == (32, 48, 3)
    assert np.array_equal(truth[mask == 1], np.full(((mask == 1).sum(), 3), (128, 0, 0)))
    assert np.array_equal(truth[mask == 255], np.full(((mask == 255).sum(), 3), (224, 224, 192)))
