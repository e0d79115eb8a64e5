"""Whole runs in many settings: each distils, evaluates to the recorded figure, and says what it decided."""

import json

import numpy as np
import pytest
from PIL import Image

RUN = ["trainer.accelerator=cpu", "trainer.threads=1", "method.diffkd.num_steps=2", "data.workers=0"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of 12 pictures that differ in brightness, in folders, in a CSV list and in one heap."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows = ["path,label"]
    for label, kind in enumerate(("cat", "dog")):
        for i in range(12):
            place = root / "classes" / kind / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            noise = random.integers(0, 120, (40, 48, 3)) + 100 * label
            Image.fromarray(noise.astype(np.uint8)).save(place)
            rows.append(f"classes/{kind}/{i}.png,{kind}")
    (root / "train.csv").write_text("\n".join(rows) + "\n")
    return root


def distil(diffkd, recipe, *words):
    status, _, err = diffkd("distill", recipe, *RUN, "output=a", *words)
    assert status == 0, err
    evaluated, said, _ = diffkd("evaluate", "a")
    assert evaluated == 0
    assert "as recorded" in said
    return err


@pytest.mark.parametrize(
    "words",
    [
        ["data.mixup=0.8", "data.cutmix=1.0", "task.label_smoothing=0.1"],
        ["trainer.ema=0.9", "optimizer=adamw", "trainer.clip_grad_norm=1.0"],
        [
            "optimizer={name: rmsproptf, lr: 0.001}",
            "schedule={name: step, every: 1, factor: 0.97, warmup_epochs: 1}",
        ],
        ["trainer.precision=bf16", "trainer.channels_last=true"],
        ["trainer.accumulate=2", "data.batch_size=64", "schedule=poly"],
        ["student=timm/resnet10t", "student.size=32", "data.batch_size=64", "trainer.max_steps=2"],
        [
            "student=torchvision/shufflenet_v2_x0_5",
            "student.size=32",
            "data.batch_size=64",
            "trainer.max_steps=2",
        ],
        ["method={kd: {temperature: 2, standardize: true}, diffkd: 0.5}"],
    ],
)
def test_settings(words, tiny, diffkd):
    distil(diffkd, "tiny.yaml", *words)


FOLDER = [
    "teacher=simple/cnn8",
    "student=simple/cnn4",
    "teacher.train=null",
    "data.image_size=32",
    "data.batch_size=4",
]


def test_a_folder_without_another_word(pictures, diffkd, tmp_path):
    words = [f"data.root={pictures / 'classes'}", *FOLDER, "trainer.epochs=2"]
    err = distil(diffkd, "folder", *words)
    assert "2 of its 24 pictures held out" in err
    config = json.loads((tmp_path / "a/student/config.json").read_text())
    assert config["class_names"] == ["cat", "dog"]


def test_a_teacher_made_for_the_folder(pictures, diffkd):
    words = [f"data.root={pictures / 'classes'}", *FOLDER, "teacher.train.epochs=1", "trainer.epochs=1"]
    err = distil(diffkd, "folder", *words)
    assert "training simple/cnn8 once" in err


def test_a_list_of_pictures(pictures, diffkd):
    words = [f"data.root={pictures}", "data=table", *FOLDER, "trainer.epochs=1"]
    distil(diffkd, "folder", *words)


def test_without_labels_the_figure_is_the_agreement_with_the_teacher(pictures, diffkd, tmp_path):
    words = [
        "data.labels=none",
        "data.num_classes=2",
        f"data.root={pictures / 'classes'}",
        "trainer.epochs=1",
    ]
    distil(diffkd, "folder", *FOLDER, *words)
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["metric_label"] == "top-1 agreement with the teacher"
    assert "task.cross_entropy" not in (tmp_path / "a/metrics.csv").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.labels=none", "data.num_classes=2", "method=none"], "there is nothing to learn from"),
        (["data.labels=none"], "say how many classes the teacher tells apart: data.num_classes=K"),
        (["teacher=timm/resnet1O1"], "unknown model 'timm/resnet1O1'; did you mean 'resnet101"),
        (["student.options={depht: 3}"], "model 'simple/cnn4' takes no option 'depht'"),
        (["data.image_size=0"], "data.image_size=0 must be 1 to 16384 pixels"),
        (["data.mixup=-1"], "data.mixup: needs at least 0"),
        (["data=torchvision/Food1O1"], "unknown data.dataset 'Food1O1'; did you mean 'Food101'"),
        (["data=digits/a"], "data 'digits' is one data set: leave out '/a'"),
    ],
)
def test_mistakes(words, said, pictures, diffkd, tmp_path):
    status, _, err = diffkd(
        "distill", "folder", f"data.root={pictures / 'classes'}", *FOLDER, *words, "output=a"
    )
    assert (status, err.count("\n")) == (2, 1)
    assert said in err
    assert not (tmp_path / "a").exists()


def test_logits_of_a_head_for_other_classes_are_refused(pictures, diffkd, tmp_path):
    from safetensors.torch import save_file

    from diffkd.models.simple import SimpleCNN

    save_file(SimpleCNN(8, 3, 7).state_dict(), tmp_path / "seven.safetensors")
    words = [
        f"data.root={pictures / 'classes'}",
        *FOLDER,
        "teacher.weights=seven.safetensors",
        "trainer.epochs=1",
    ]
    status, _, err = diffkd("distill", "folder", *words, "output=b")
    assert (status, err.count("\n")) == (2, 1)
    assert "its weights are for other classes" in err
    status, _, err = diffkd("distill", "folder", *words, "output=b", "method=fitnet")
    assert status == 0, err
    assert "fresh head (head.weight, head.bias) for 2 instead of 7 classes" in err.replace(
        "head.bias, head.weight", "head.weight, head.bias"
    )
