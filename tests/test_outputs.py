"""Classifiers that give more than a tensor: objects with logits, and auxiliary heads in training."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffkd import Batch, Distiller
from diffkd.assembly import assemble, check_outputs
from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.models.base import Preprocess
from diffkd.recipe.schema import ModelRecipe, load
from diffkd.recipe.sides import build_side
from diffkd.runs.folder import RunFolder
from diffkd.tasks.classification import Classification

MODELS = """
import collections
import dataclasses
import torch
from torch import nn

Heads = collections.namedtuple("Heads", "logits aux_logits2 aux_logits1")

@dataclasses.dataclass
class Answer:
    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden_states: tuple | None = None

class Net(nn.Module):
    def __init__(self, num_classes, kind):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        self.head, self.aux, self.kind = nn.Linear(4, num_classes), nn.Linear(4, num_classes), kind

    def forward(self, pixel_values):
        feature = self.body(pixel_values).mean((2, 3))
        logits = self.head(feature)
        if self.kind == "answer":
            return Answer(None, logits, (feature,))
        if self.kind == "dict":
            return {"logits": logits}
        if not self.training:
            return logits
        aux = self.aux(feature)
        return Heads(logits, aux, -aux) if self.kind == "two" else (logits, aux)

def answer(num_classes): return Net(num_classes, "answer")
def mapping(num_classes): return Net(num_classes, "dict")
def two(num_classes): return Net(num_classes, "two")
def one(num_classes): return Net(num_classes, "one")

def vit(num_classes):
    from transformers import ViTConfig, ViTForImageClassification
    return ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8,
        patch_size=4, num_channels=1, num_labels=num_classes))
"""


@pytest.fixture
def nets(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(MODELS)


def task(**options):
    return Classification(Data([], [], 3, (1, 8, 8)), **options)


@pytest.mark.parametrize(
    ("heads", "options", "weight"), [(1, {}, 0.4), (2, {}, 0.3), (2, {"auxiliary_weight": 0.5}, 0.5)]
)
def test_auxiliary_heads_have_their_usual_weights(heads, options, weight):
    scores = [torch.randn(4, 3) for _ in range(heads + 1)]
    targets = torch.tensor([0, 1, 2, 0])
    losses = task(**options).loss(tuple(scores), Batch(torch.zeros(4, 1, 8, 8), targets))
    assert torch.equal(losses["cross_entropy"], F.cross_entropy(scores[0], targets))
    wanted = weight * sum(F.cross_entropy(s, targets) for s in scores[1:])
    assert torch.allclose(losses["auxiliary"], wanted)


@pytest.mark.parametrize(("name", "weight"), [("googlenet", 0.3), ("inception_v3", 0.4)])
def test_torchvisions_heads_are_understood_in_their_own_order(name, weight):
    main, early, late = torch.zeros(2, 3), torch.ones(2, 3), torch.eye(3)[:2]
    module = __import__(f"torchvision.models.{name.partition('_')[0]}", fromlist=["x"])
    if name == "googlenet":
        output, heads = module.GoogLeNetOutputs(main, late, early), (early, late)
    else:
        output, heads = module.InceptionOutputs(main, late), (late,)
    targets = torch.tensor([0, 2])
    losses = task().loss(output, Batch(torch.zeros(2, 3, 8, 8), targets))
    assert losses["cross_entropy"].item() == pytest.approx(F.cross_entropy(main, targets).item())
    wanted = sum(F.cross_entropy(head, targets).item() for head in heads)
    assert losses["auxiliary"].item() == pytest.approx(weight * wanted)


def test_without_auxiliary_outputs_there_is_no_such_loss():
    module = __import__("torchvision.models.googlenet", fromlist=["x"])
    output = module.GoogLeNetOutputs(torch.zeros(2, 3), None, None)
    batch = Batch(torch.zeros(2, 3, 8, 8), torch.tensor([0, 2]))
    assert list(task().loss(output, batch)) == ["cross_entropy"]
    with pytest.raises(UserError, match=r"auxiliary_weight=-1: needs at least 0"):
        task(auxiliary_weight=-1)


@pytest.mark.parametrize("student", ["answer", "mapping", "two", "one", "vit"])
def test_any_form_of_output_distils_and_evaluates(nets, diffkd, tmp_path, student):
    words = [f"student=nets.py:{student}", "method=kd", "trainer.epochs=1", "output=a"]
    status, _, err = diffkd("distill", "tiny.yaml", *words)
    assert status == 0, err
    status, out, err = diffkd("evaluate", "a", "trust=true")
    assert (status, "as recorded" in out) == (0, True), err
    row = RunFolder(tmp_path / "a").read_history()[-1]
    assert row["kd.output.kd"] > 0
    assert ("task.auxiliary" in row) == (student in ("two", "one"))


def test_a_teacher_with_logits_teaches_its_class_scores(nets, tmp_path):
    recipe = load("tiny.yaml", ["teacher=nets.py:answer", "student=nets.py:two", "method=kd"])
    parts = assemble(recipe)
    sample = parts.sample(4)
    distiller, warnings = parts.distiller(sample)
    assert not warnings
    losses = distiller.train()(sample)
    student, teacher = parts.student.model.eval(), parts.teacher.model
    scores = student(parts.student.prepare(sample.images)), teacher(parts.teacher.prepare(sample.images))
    ours, theirs = scores[0], scores[1].logits
    assert torch.equal(losses.output.logits, ours)
    divergence = F.kl_div(
        F.log_softmax(ours / 4, 1), F.log_softmax(theirs / 4, 1), reduction="batchmean", log_target=True
    )
    weight = distiller.weights["kd"]
    assert losses["kd.output.kd"].item() == pytest.approx(weight * 16 * divergence.item(), rel=1e-4)


def test_a_model_without_class_scores_is_refused(nets, diffkd, tmp_path):
    (tmp_path / "odd.py").write_text(
        "from torch import nn\nclass Odd(nn.Module):\n    def forward(self, x): return {'boxes': x}\n"
        "def net(num_classes): return Odd()\n"
    )
    status, _, err = diffkd("train", "tiny.yaml", "student=odd.py:net", "output=b")
    assert (status, err.count("\n")) == (2, 1)
    assert "student 'odd.py:net' gives dict, classification needs logits (B, 10)" in err
    assert not (tmp_path / "b").exists()


def test_a_model_that_refuses_pictures_without_a_word_is_one_line(nets, tiny, diffkd, tmp_path):
    (tmp_path / "mute.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def forward(self, images):\n"
        "        assert images.shape[-1] == 9\n"
        "def net(num_classes): return Net(9, num_classes)\n"
    )
    status, _, err = diffkd("train", "tiny.yaml", "student=mute.py:net", "output=b")
    assert (status, err) == (
        2,
        "error: student 'mute.py:net' cannot take pictures of (1, 8, 8): AssertionError (mute.py, line 4)\n",
    )
    assert not (tmp_path / "b").exists()


def test_in_ones_own_loop_a_tuple_in_training_is_its_first_entry():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return (self.fc(x), self.fc(-x)) if self.training else self.fc(x)

    batch = torch.rand(2, 4)
    distiller = Distiller(Two(), nn.Linear(4, 3), {"": ""}, "kd", batch)
    assert set(distiller.train()(batch)) == {"kd.output.kd"}


BARE = """
import torch
from torch import nn

class Body(nn.Module):
    def __init__(self, form, channels=1):
        super().__init__()
        self.form = form
        self.a = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(16, 10)
    def forward(self, x):
        deep = self.b(early := self.a(x))
        scores = self.head(deep.mean((2, 3)))
        return {"map": deep, "pyramid": [early, deep], "vector": deep.mean((2, 3)), "list": [scores],
                "pred": {"pred": scores}, "tuple": (scores, deep)}[self.form]

def net(form): return Body(form)
"""


@pytest.fixture
def bare(nets, tmp_path):
    (tmp_path / "bare.py").write_text(BARE)
    return lambda *words: assemble(load("tiny.yaml", ["teacher=bare.py:net", *words]))


@pytest.mark.parametrize("form", ["map", "pyramid", "vector"])
def test_a_backbone_teaches_its_features_alone(bare, form):
    parts = bare(f"teacher.options.form={form}", "method=diffkd,fitnet")
    check_outputs(parts, sample := parts.sample(4))
    distiller, _ = parts.distiller(sample)
    assert [(pair.teacher.layer, pair.is_logits) for pair in distiller.pairs] == [("b", False)]
    assert "teacher: it gives no class scores: its features alone teach" in list(parts.notes())
    assert not parts.teacher_answers
    with pytest.raises(UserError, match=r"teacher 'bare.py:net' (gives|has 16 classes)"):
        check_outputs(parts := bare(f"teacher.options.form={form}", "method=kd"), parts.sample(4))


@pytest.mark.parametrize("form", ["list", "pred", "tuple"])
def test_class_scores_in_a_list_or_dict_teach(bare, form):
    parts = bare(f"teacher.options.form={form}", "method=kd")
    check_outputs(parts, sample := parts.sample(4))
    distiller, _ = parts.distiller(sample)
    assert [pair.is_logits for pair in distiller.pairs] == [True]
    assert distiller(sample)["kd.output.kd"] > 0


def test_a_run_with_a_backbone_has_a_teacher_without_figures(bare, diffkd, tmp_path):
    words = ["teacher=bare.py:net", "teacher.options.form=map", "method=fitnet", "trainer.steps=2"]
    status, out, err = diffkd("distill", "tiny.yaml", *words, "output=o")
    assert status == 0, err
    assert "bare.py:net" in out
    teacher = json.loads((tmp_path / "o/summary.json").read_text())["teacher"]
    assert teacher["parameters"] > 0
    assert "top1" not in teacher


def test_colours_become_grey_for_a_model_of_one_channel():
    colour = torch.rand(2, 3, 4, 4)
    grey = Preprocess((0.5,), (0.25,), channels=1)(colour)
    luma = 0.299 * colour[:, :1] + 0.587 * colour[:, 1:2] + 0.114 * colour[:, 2:]
    assert torch.allclose(grey, (luma - 0.5) / 0.25, atol=1e-6)
    data = Data([], [], 10, (3, 8, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))
    side = build_side(ModelRecipe(model="timm/resnet10t", options={"in_chans": 1}), data)
    assert side.input_shape == (1, 8, 8)
    assert side.notes == ["it takes grey pictures: colours become grey"]
    assert side.prepare.mean.flatten().tolist() == pytest.approx([0.299 * 0.4 + 0.587 * 0.5 + 0.114 * 0.6])
    assert side.model.eval()(side.prepare(torch.rand(2, 3, 32, 32))).shape == (2, 10)
