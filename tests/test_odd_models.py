"""Models of other kinds: programs without modes, models that are there already, outputs of any form."""

import warnings

import pytest
import torch

from diffkd.assembly import assemble, check_outputs
from diffkd.errors import UserError
from diffkd.models.base import Modeless
from diffkd.recipe.schema import load
from diffkd.training.dryrun import try_step

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, num_classes)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))

def of(change):
    class Other(Net):
        def forward(self, images):
            return change(self, super().forward(images))
    return Other

def wrapped(num_classes):
    return torch.compile(nn.DataParallel(Net(num_classes)), backend="eager")

def frozen(num_classes):
    return torch.jit.freeze(torch.jit.script(Net(num_classes).eval()))

class Program(Net):
    def train(self, mode=True):
        raise NotImplementedError("Calling train() is not supported yet.")

ready = Net()
shares = of(lambda net, scores: scores.softmax(1))
whole = of(lambda net, scores: scores.long())
broken = of(lambda net, scores: scores * float("nan"))
out = of(lambda net, scores: {"out": scores, "aux": scores})
cut = of(lambda net, scores: scores.detach())
loss = of(lambda net, scores: {"loss": scores.sum()} if net.training else scores)

class Squeezed(Net):
    def forward(self, images):
        if len(images) == 1:
            raise ValueError("no batch of one")
        return super().forward(images)

def quantised(num_classes):
    return torch.ao.quantization.quantize_dynamic(Net(num_classes), {nn.Linear})
"""


@pytest.fixture
def parts(tiny, tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)

    def parts(*words):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            found = assemble(load(str(tiny), [*words, "data.batch_size=8"]))
        sample = found.sample(2)
        check_outputs(found, sample)
        return found, sample

    return parts


@pytest.mark.parametrize("name", ["frozen", "Program"])
def test_programs_without_modes_teach(parts, name):
    found, sample = parts(f"teacher=nets.py:{name}", "teacher.train=null", "student=nets.py:Net", "method=kd")
    assert isinstance(found.teacher.model, Modeless)
    distiller, _ = found.distiller(sample)
    assert distiller(sample).total.isfinite()
    assert found.cost(found.teacher).macs > 0
    assert not try_step(found.step(distiller), sample, "net")


def test_a_model_that_is_there_already_is_copied(parts):
    found, _ = parts("student=nets.py:ready", "teacher=nets.py:ready", "teacher.train=null", "method=kd")
    ours, theirs = found.student.model, found.teacher.model
    assert ours is not theirs
    assert torch.equal(ours.head.weight, theirs.head.weight)


def test_wrappers_around_a_model_are_taken_off(parts):
    found, _ = parts("student=nets.py:wrapped", "method=none", "teacher=null")
    assert type(found.student.model).__name__ == "Net"


def test_probabilities_are_said_of_both_models(parts):
    words = ["teacher=nets.py:shares", "teacher.train=null", "method=kd"]
    found, _ = parts("student=nets.py:shares", *words)
    for side in (found.student, found.teacher):
        assert any("its output ends in a softmax" in note for note in side.notes)
    assert not parts("student=nets.py:out", "method=none", "teacher=null")[0].student.notes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("whole", "gives int64, classification needs logits in floating point"),
        ("broken", "gives values that are not finite for the first pictures"),
        ("quantised", "of its state_dict is no plain tensor, and cannot be saved"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_at_the_start(parts, name, words):
    with pytest.raises(UserError, match=words):
        parts(f"student=nets.py:{name}", "method=none", "teacher=null")


@pytest.mark.parametrize(
    ("name", "words"), [("cut", "nothing in it can learn"), ("loss", "it gives a dict in training")]
)
def test_a_step_that_fails_says_why(parts, name, words):
    found, sample = parts(f"student=nets.py:{name}", "method=none", "teacher=null")
    with pytest.raises(UserError, match=words):
        try_step(found.step(found.distiller(sample)[0]), sample, name)


def test_a_model_that_takes_no_single_picture_is_one_line(parts):
    found, _ = parts("student=nets.py:Squeezed", "method=none", "teacher=null")
    with pytest.raises(UserError, match="cannot take 1 picture alone: no batch of one"):
        found.cost(found.student)
