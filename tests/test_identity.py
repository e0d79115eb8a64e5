"""What determines a result is noticed wherever the result may serve again, and what does not is not."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import diffkd as library
from diffkd.data.base import Data
from diffkd.recipe.schema import load
from diffkd.runs import content
from diffkd.runs.content import digests
from diffkd.runs.identity import changed, identify

LOSSES = """
from diffkd import Method
from my_scale import SCALE


class MyLoss(Method):
    def __init__(self, setup):
        super().__init__()

    def forward(self, student, teacher, batch):
        return {"difference": SCALE * sum((student[n] - teacher[n]).square().mean() for n in student)}
"""
WORDS = [
    "teacher=simple/cnn4",
    "student=simple/cnn4",
    "method=my_losses.py:MyLoss",
    "teacher.train.epochs=1",
    "trainer.epochs=1",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "data.image_size=16",
    "data.batch_size=4",
    "data.workers=0",
    "data=table",
    "data.root=photos",
    "task.label_smoothing=0.1",
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with own pictures, a list of labels, an own loss and what that imports."""
    monkeypatch.setenv("DIFFKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 10), ("test", 6)):
        rows = ["path,label"]
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i in range(count):
            _picture(tmp_path / "photos" / split / f"{i}.bmp", i)
            rows.append(f"{split}/{i}.bmp,{i % 2}")
        (tmp_path / "photos" / f"{split}.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "my_losses.py").write_text(LOSSES)
    (tmp_path / "my_scale.py").write_text("SCALE = 1.0\n")
    return tmp_path


def _picture(place, seed):
    noise = np.random.default_rng(seed).integers(0, 255, (20, 20, 3))
    Image.fromarray(noise.astype(np.uint8)).save(place)


def relabel(project, name="train"):
    table = project / "photos" / f"{name}.csv"
    table.write_text(table.read_text().replace("/3.bmp,1", "/3.bmp,0"))


CHANGES = {
    "training labels": relabel,
    "test labels": lambda project: relabel(project, "test"),
    "training pictures": lambda project: _picture(project / "photos/train/3.bmp", 99),
    "test pictures": lambda project: _picture(project / "photos/test/3.bmp", 99),
    "my_losses.py": lambda project: (project / "my_losses.py").write_text(LOSSES.replace("SCALE *", "2 *")),
    "my_scale.py": lambda project: (project / "my_scale.py").write_text("SCALE = 2.0\n"),
}


def test_a_run_notices_what_changed_and_says_which(project, diffkd):
    words = ["distill", "folder", *WORDS, "output=a"]
    status, _, err = diffkd(*words)
    assert status == 0, err
    assert set(json.loads((project / "a/identity.json").read_text())) == {
        "recipe",
        "data",
        "weights",
        "code",
        "versions",
        "global batch",
    }
    before = {name: (project / name).read_bytes() for name in ("my_losses.py", "my_scale.py")}
    photos = shutil.copytree(project / "photos", project / "kept")
    for which, change in CHANGES.items():
        change(project)
        status, _, err = diffkd(*words, "resume=true")
        assert (status, err.count("\n")) == (2, 1), err
        assert which in err
        shutil.rmtree(project / "photos")
        shutil.copytree(photos, project / "photos")
        for name, text in before.items():
            (project / name).write_bytes(text)
    indifferent = ["trainer.log_every=3", "trainer.threads=2", "data.max_corrupt=3", "data.workers=1"]
    status, _, err = diffkd(*words, "resume=true", *indifferent)
    assert status == 0
    assert "is finished" in err
    assert "once" not in err


def test_a_made_teacher_is_made_anew_where_its_data_changed_and_why_is_said(project, diffkd):
    words = ["distill", "folder", *WORDS, "method=kd"]
    status, _, err = diffkd(*words, "output=a")
    assert (status, "once" in err) == (0, True), err
    status, _, err = diffkd(*words, "output=b", "data.max_corrupt=5", "trainer.threads=2", "seed=3")
    assert (status, "once" in err) == (0, False), err
    relabel(project)
    status, _, err = diffkd(*words, "output=c")
    assert (status, "once" in err) == (0, True), err
    assert "was made on other data (training labels)" in err


def test_another_version_is_noticed_by_teacher_run_and_comparison(project, diffkd, monkeypatch):
    words = ["folder", *WORDS[:2], *WORDS[3:], "methods=none,kd", "seeds=1", "output=c"]
    assert diffkd("compare", *words)[0] == 0
    monkeypatch.setattr(library, "__version__", "99.0")
    status, _, err = diffkd("compare", *words)
    assert (status, err.count("\n")) == (2, 1)
    assert "other versions (diffkd is 0.1.0 there and 99.0 here)" in err
    status, _, err = diffkd("compare", *words[:-1], "output=d")
    assert status == 0
    status, _, err = diffkd("compare", *words[:-1], "output=d", "data.batch_size=2")
    assert status == 2
    assert "data.batch_size is 4 there and 2 here" in err


def damage_tensors(folder):
    place = folder / "student/model.safetensors"
    content = bytearray(place.read_bytes())
    content[-5] ^= 1
    place.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        damage_tensors,
        lambda folder: (folder / "student/model.safetensors").write_bytes(b""),
        lambda folder: (folder / "student/model.safetensors").unlink(),
        lambda folder: (folder / "summary.json").write_text("{"),
        lambda folder: (folder / "recipe.yaml").write_text("a: [b"),
        lambda folder: (shutil.rmtree(folder), folder.write_text("a file")),
    ],
)
def test_a_damaged_teacher_is_made_again(harm, tiny, diffkd, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFKD_CACHE", str(tmp_path / "cache"))
    words = ["distill", "tiny.yaml", "teacher.train.epochs=1", "trainer.epochs=1", "trainer.max_steps=2"]
    assert diffkd(*words, "output=a")[0] == 0
    (folder,) = (path for path in (tmp_path / "cache/teachers").iterdir() if path.is_dir())
    whole = (folder / "student/model.safetensors").read_bytes()
    harm(folder)
    status, _, err = diffkd(*words, "output=b")
    assert status == 0, err
    assert "it is made again" in err
    assert (folder / "student/model.safetensors").read_bytes() == whole
    status, _, err = diffkd(*words, "output=c")
    assert (status, "once" in err) == (0, False)


def test_weights_of_a_part_count_by_their_content(tmp_path):
    def of(name, content=None):
        if content is not None:
            (tmp_path / name).write_bytes(content)
            name = tmp_path / name
        return identify(load("masks", [f"teacher.options.encoder_weights={name}"]), {})

    one = of("encoder.pth", b"one")
    assert changed(one, of("encoder.pth", b"other")) == "weights (teacher.encoder_weights)"
    assert of("moved.pth", b"one") == one
    assert of("pretrained")["recipe"] != one["recipe"]


class Own:
    """Samples of one's own with a cache that fills up."""

    def __init__(self, shift=0):
        self.x = torch.arange(12.0).reshape(4, 3, 1, 1) + shift
        self.y = [0, 1, 0, 1]
        self.cache = {}

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.cache[index] = True
        return self.x[index], self.y[index]


def test_own_samples_count_by_what_they_hold():
    def of(split):
        return digests(Data(split, Own(), 2, (3, 1, 1)), None)

    one, other = Own(), Own()
    assert of(one) == of(other)
    one[0]
    assert of(one) == of(other)
    other.y[2] = 1
    assert {k for k, v in of(other).items() if v != of(one)[k]} == {"training labels"}
    assert {k for k, v in of(Own(1)).items() if v != of(one)[k]} == {"training pictures"}


def test_of_many_files_the_sizes_count_and_of_some_the_content(tmp_path, monkeypatch):
    from diffkd.pictures.files import Files

    monkeypatch.setattr(content, "MOST_FILES", 10)
    monkeypatch.setattr(content, "MOST_BYTES", 100)
    for i in range(40):
        (tmp_path / f"{i}").write_bytes(bytes(range(50)) * 1000)

    def of():
        split = Files(tmp_path, [str(i) for i in range(40)], np.zeros(40, int))
        return digests(Data(split, split, 1, (3, 1, 1)), str(tmp_path))["training pictures"]

    before = of()
    (tmp_path / "4").write_bytes(bytes(range(50)) * 999 + bytes(50))
    assert of() != before
    before = of()
    (tmp_path / "7").write_bytes(bytes(range(50)) * 1001)
    assert of() != before
