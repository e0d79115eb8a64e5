"""Targets of one's own data that are no class indices: named before any work, or at the end of an epoch."""

import pytest
import torch
import torch.nn.functional as F

from diffkd import Batch, Distiller
from diffkd.data.base import Data, Loader
from diffkd.data.base import build as build_data
from diffkd.errors import UserError
from diffkd.pictures.memory import mix_batch
from diffkd.recipe.schema import check_options, load
from diffkd.tasks.classification import Classification

DATA = """
import torch
from diffkd import Data

LABELS = torch.arange(64) % 3

class Rows(torch.utils.data.Dataset):
    def __init__(self, targets): self.targets = targets
    def __len__(self): return len(self.targets)
    def __getitem__(self, i): return torch.full((1, 8, 8), float(LABELS[i]) / 3), self.targets[i]

def targets(kind):
    one_hot = torch.eye(3)[LABELS]
    late = LABELS.clone()
    late[50] = 12
    multi = one_hot.clone()
    multi[::2, 0] = 1
    return {
        "one-hot": one_hot.long(), "multi-hot": multi, "float64": LABELS.double(), "high": LABELS + 1,
        "scores": one_hot * 5, "wide": torch.zeros(64, 7), "words": [str(i) for i in LABELS.tolist()],
        "late": late, "int32": LABELS.int(), "probabilities": one_hot.double() * 0.7 + 0.1,
        "column": LABELS[:, None],
    }[kind]

def build(root, *, kind: str, test: str = "int32"):
    return Data(Rows(targets(kind)), Rows(targets(test)), num_classes=3, image_shape=(1, 8, 8))
"""
REFUSED = {
    "one-hot": r"training data: the targets are one-hot (16, 3); .*: give target.argmax() for each picture",
    "multi-hot": "training data: the targets are multi-hot (16, 3), several classes or none for a picture",
    "float64": "training data: the targets are float64 (16,); classification needs class indices (B,)",
    "high": "training data: target 3 is no class of 0 to 2; mend it, or set the data's num_classes",
    "scores": "training data: the targets (16, 3) are no probabilities: a row sums to 5",
    "wide": "training data: the targets are float32 (16, 7); classification needs class indices (B,)",
    "words": "training data: the targets are a tuple; classification needs class indices (B,)",
    "column": "training data: the targets are int64 (16, 1); classification needs class indices (B,)",
}


@pytest.fixture
def own(tiny, tmp_path, diffkd):
    (tmp_path / "own.py").write_text(DATA)
    (tmp_path / "own.yaml").write_text("base: tiny.yaml\ntrainer: {epochs: 1}\n")

    def run(command, kind, *words):
        settings = [f"data.kind={kind}", "data.batch_size=16", "data.workers=0", *words]
        words = ["own.yaml", "data=own.py:build", *settings]
        return diffkd(command, *words, *(["output=a"] if command == "train" else []))

    return run


@pytest.mark.parametrize("kind", REFUSED)
def test_targets_that_are_no_classes_are_named_before_any_work(own, tmp_path, kind):
    status, _, err = own("train", kind)
    assert (status, err.count("\n")) == (2, 1)
    first, _, rest = REFUSED[kind].partition(".*")
    assert first in err
    assert rest in err
    assert not (tmp_path / "a").exists()


SAMPLES = """
import torch
from diffkd import Data

def build(root, *, kind: str):
    rows = [(torch.rand(1, 8, 8), i % 3) for i in range(8)]
    if kind == "mapping":
        rows = [{"image": image, "label": label} for image, label in rows]
    return Data(rows, [] if kind == "no test" else rows, 3, (1, 8, 8))
"""


def test_samples_that_are_no_pictures_are_named_before_any_work(diffkd, tiny, tmp_path):
    (tmp_path / "samples.py").write_text(SAMPLES)
    words = ["data=samples.py:build", "data.batch_size=4", "data.workers=0", "method=none"]
    for kind, said in (
        ("mapping", "samples are mappings; give (image, target)"),
        ("no test", "there is not one test sample"),
    ):
        status, _, err = diffkd("distill", tiny, *words, f"data.kind={kind}", "output=a")
        assert (status, err.count("\n")) == (2, 1), err
        assert said in err
    assert not (tmp_path / "a").exists()


def test_check_looks_at_them_too_and_at_the_test_datas(own):
    status, _, err = own("check", "one-hot")
    assert (status, "one-hot" in err) == (2, True)
    status, _, err = own("check", "int32", "data.test=float64")
    assert (status, "test data: the targets are float64 (16,)" in err) == (2, True), err


@pytest.mark.parametrize("mixup", [0, 0.8])
def test_a_label_out_of_range_in_a_later_batch_ends_the_epoch_in_one_line(own, mixup):
    status, _, err = own("train", "late", "trainer.log_every=1000", f"data.mixup={mixup}")
    assert status == 2
    assert "Traceback" not in err
    assert "targets are neither classes of 0 to 2 nor probabilities that sum to 1 (found: " in err
    assert ("found: 12)" in err) == (not mixup)


@pytest.mark.parametrize("kind", ["int32", "probabilities"])
def test_other_kinds_of_numbers_train(own, kind):
    status, out, err = own("train", kind, "data.test=probabilities", "optimizer.lr=0.1")
    assert status == 0, err
    assert "top-1" in out + err


def task():
    return Classification(Data([], [], 3, (1, 8, 8)))


def test_losses_of_good_targets_are_cross_entropys_own():
    scores, images, good = torch.randn(4, 3), torch.zeros(4, 1, 8, 8), torch.tensor([0, 2, 1, -100])
    classes = task()
    loss = classes.loss(scores, Batch(images, good))["cross_entropy"]
    assert torch.equal(loss, F.cross_entropy(scores, good))
    shares = torch.rand(4, 3).double().softmax(1)
    loss = classes.loss(scores, Batch(images, shares))["cross_entropy"]
    assert torch.equal(loss, F.cross_entropy(scores, shares.float()))
    classes.check_seen()


def test_wrong_targets_teach_nothing_and_are_counted():
    scores, images = torch.randn(4, 3), torch.zeros(4, 1, 8, 8)
    classes = task()
    loss = classes.loss(scores, Batch(images, torch.tensor([0, 7, -1, 2])))["cross_entropy"]
    assert torch.equal(loss, F.cross_entropy(scores[[0, 3]], torch.tensor([0, 2])))
    classes.loss(scores, Batch(images, torch.tensor([0, 1, 5, 2])))
    with pytest.raises(UserError, match=r"3 targets are neither .* \(found: 7\)"):
        classes.check_seen()
    classes.check_seen()


def test_mixup_of_a_label_out_of_range_is_found():
    batch = Batch(torch.zeros(2, 1, 4, 4), torch.tensor([0, 9]))
    mixed = mix_batch(batch, 3, 0.8, 0.0, torch.Generator().manual_seed(0))
    classes = task()
    classes.loss(torch.zeros(2, 3), mixed)
    with pytest.raises(UserError, match="2 targets are neither"):
        classes.check_seen()


OWN = """
import torch
from diffkd import Data, Method

class Rows(torch.utils.data.Dataset):
    def __init__(self, kind): self.kind = kind
    def __len__(self): return 12
    def __getitem__(self, i):
        if self.kind == "raises" and i == 7:
            raise KeyError("seven")
        size = 8 if self.kind != "sizes" or i % 2 else 9
        return torch.rand(3, size, size), None if self.kind == "none" else i % 3

def build(*, kind: str = "", words: str = "?", several: list[str] | None = None):
    return Data(Rows(kind), Rows(kind), 3, (3, 8, 8)) if kind != "nothing" else None

def broken(root): return 1 / 0
def two(root, other): return None

def net(num_classes, name: str = "x", width: int = 2):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, num_classes))

class Mine(Method):
    def __init__(self, setup): super().__init__(setup)
    def forward(self, student, teacher, batch): return {}
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "root", "options", "said"),
    [
        ("build", None, {"kind": "none"}, "samples do not make a batch: TypeError: .*a target is None"),
        (
            "build",
            None,
            {"kind": "sizes"},
            r"images differ in size, \(3, 8, 8\) and \(3, 9, 9\)",
        ),
        ("build", None, {"kind": "raises"}, r"sample 7 .* be had: KeyError: 'seven' \(own.py, line 10\)"),
        ("build", None, {"kind": "nothing"}, "data 'own.py:build' gave a NoneType, not a diffkd.Data"),
        ("build", "x", {}, "'own.py:build' takes no data.root"),
        ("broken", "x", {}, r"cannot be built: ZeroDivisionError: division by zero \(own.py, line \d+\)"),
        ("two", "x", {}, "its argument 'other' needs a default behind a `\\*`"),
    ],
)
def test_mistakes_in_code_of_ones_own_are_one_line(code, name, root, options, said):
    with pytest.raises(UserError, match=said) as caught:
        list(Loader(build_data(f"own.py:{name}", root, options).train, 4, shuffle=False).epoch())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["no", "2024-11-25", "1e3", "a: b", "~x", "#1"])
def test_options_of_ones_own_code_that_are_text_are_the_words(code, tiny, text):
    words = ["data=own.py:build", f"data.words={text}", "data.several=[no, 1]", "student=own.py:net"]
    words += [f"student.options.name={text}", "student.options.width=4"]
    recipe = load(str(tiny), words)
    assert recipe.data.options == {"words": text, "several": ["no", "1"]}
    assert recipe.student.options == {"name": text, "width": 4}
    check_options(recipe)
    with pytest.raises(UserError, match="trust: needs true or false"):
        load(str(tiny), ["trust=maybe"])


def test_a_method_of_ones_own_that_cannot_be_built_is_one_line(code):
    with pytest.raises(UserError, match=r"method 'Mine' cannot be built: TypeError: .* \(own.py, line \d+\)"):
        Distiller(*models(), None, "own.py:Mine", torch.rand(2, 3, 8, 8))


def models():
    return [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)) for _ in range(2)]
