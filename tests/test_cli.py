"""The command line as a person meets it: each mistake is one line, exit status 2, nothing written."""

import importlib
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import TINY
from diffkd.names import submodules


def test_help_and_version_answer_without_torch():
    for flag in ("--help", "--version"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        command = [sys.executable, "-m", "diffkd.cli", flag]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "diffkd" in done.stdout
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.5  # usually 0.3 s
    code = "import sys; sys.argv = ['diffkd', '--version']; from diffkd.cli import app\n"
    code += "try: app()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_distil_evaluate_and_the_figure_to_the_last_digit(diffkd, tiny, tmp_path):
    status, out, err = diffkd("distill", tiny, "output=a")
    assert status == 0, err
    assert "simple/cnn4" in out
    assert "run folder: a" in out
    assert "\x1b" not in out + err  # no bar, no colour: it is not a terminal
    assert (tmp_path / "a/curves.png").stat().st_size > 10_000
    status, out, err = diffkd("evaluate", "a")
    assert status == 0, err
    assert "top1" in out
    assert "recorded: " not in out
    assert "as recorded" in out


def test_train_needs_no_teacher(diffkd, tiny):
    status, out, err = diffkd("train", tiny, "output=a")
    assert status == 0, err
    assert "teacher" not in out


def test_check_says_what_is_tapped_and_who_learns_and_writes_nothing(diffkd, tiny, tmp_path):
    status, out, err = diffkd("check", tiny)
    assert status == 0, err
    for word in ("stage3", "output", "frozen", "denoiser", "activations", "diffkd.output.kd", "MACs"):
        assert word in out
    assert "no gradient reaches" not in out
    assert {p.name for p in tmp_path.iterdir()} == {"tiny.yaml"}


@pytest.mark.parametrize("what", ["", "recipes", "methods", "data"])
def test_list(diffkd, what):
    status, out, err = diffkd("list", *([what] if what else []))
    assert status == 0, err
    expected = {"": "diffkd", "recipes": "digits", "methods": "diffkd", "data": "digits"}[what]
    assert expected in out


def test_every_source_of_models_has_names_and_builds():
    sources = [importlib.import_module(f"diffkd.models.{name}") for name in submodules("diffkd.models")]
    assert len(sources) >= 5
    assert all(callable(source.names) and callable(source.build) for source in sources)


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def mistakes():
    """Words of the command line, and what its one line must say."""
    return {
        "unknown recipe": (("digit",), "digits"),
        "missing recipe file": (("nowhere/there.yaml",), "nowhere/there.yaml"),
        "unknown key": (("tiny.yaml", "trainer.epoch=3"), "'epochs'"),
        "unknown method": (("tiny.yaml", "method=diffdk"), "diffkd"),
        "unknown option of a method": (("tiny.yaml", "method.diffkd.numsteps=3"), "num_steps"),
        "wrong type": (("tiny.yaml", "trainer.epochs=ten"), "trainer.epochs"),
        "negative epochs": (("tiny.yaml", "trainer.epochs=-1"), "trainer.epochs"),
        "no value": (("tiny.yaml", "seed"), "seed"),
        "batch larger than the data": (("tiny.yaml", "data.batch_size=100000"), "1437"),
        "missing weights": (("tiny.yaml", "teacher.weights=gone.safetensors"), "gone.safetensors"),
        "weights with code": (("tiny.yaml", "teacher.weights=evil.pth"), "evil.pth"),
        "weights that are no weights": (("tiny.yaml", "teacher.weights=tiny.yaml"), "tiny.yaml"),
        "weights of another model": (("tiny.yaml", "teacher.weights=other.pth"), "missing"),
        "different class counts": (("tiny.yaml", "teacher=own.py:seven"), "7 classes"),
        "tap that does not exist": (("tiny.yaml", "taps={stage9: stage3}"), "stage9"),
        "tap on integers": (("tiny.yaml", "student=own.py:Counting", "taps={count: stage3}"), "count"),
        "unknown data": (("tiny.yaml", "data=digit"), "digits"),
        "unknown model": (("tiny.yaml", "student=simpel/cnn4"), "simple"),
        "unknown task": (("tiny.yaml", "task=classificatoin"), "classification"),
        "output under a file": (("tiny.yaml", "output=tiny.yaml/run"), "tiny.yaml"),
        "device that is not there": (("tiny.yaml", "trainer.accelerator=cuda"), "accelerator"),
        "halves on a processor": (("tiny.yaml", "trainer.precision=fp16"), "use bf16, or fp32"),
        "no teacher": (("tiny.yaml", "teacher=null"), "teacher"),
        "cache under a file": (
            ("tiny.yaml", "teacher.train.epochs=1", "student=simple/cnn3"),
            "DIFFKD_CACHE",
        ),
    }


@pytest.mark.parametrize("name", mistakes())
def test_a_mistake_is_one_line_and_nothing_is_written(diffkd, tmp_path, name):
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "own.py").write_text(OWN)
    words, expected = mistakes()[name]
    before = {p.name for p in tmp_path.iterdir()} | {"__pycache__"}
    cache = {"DIFFKD_CACHE": str(tmp_path / "tiny.yaml")} if name.startswith("cache") else {}
    status, out, err = diffkd("distill", *words, **cache)
    lines = [line for line in err.strip().splitlines() if line.startswith("error")]
    assert status == 2, out + err
    assert len(lines) == 1, err
    assert err.strip().splitlines()[-1] == lines[0]
    assert expected in lines[0]
    assert "Traceback" not in err
    assert {p.name for p in tmp_path.iterdir()} <= before


OWN = """
import torch
from torch import nn
from diffkd.models.simple import build

def seven():
    return build("cnn8", in_channels=1, image_size=(8, 8), num_classes=7)

class Count(nn.Module):
    def forward(self, x):
        return x.argmax(1)

class Counting(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.net = build("cnn4", in_channels=1, image_size=(8, 8), num_classes=num_classes)
        self.count = Count()

    def forward(self, x):
        out = self.net(x)
        self.count(out)
        return out
"""


def test_evaluate_of_what_is_no_run(diffkd, tmp_path):
    status, _, err = diffkd("evaluate", tmp_path)
    assert status == 2
    assert "is not a run folder" in err
    assert len(err.splitlines()) == 1


def test_no_space_for_the_cache(tmp_path, monkeypatch):
    from diffkd.errors import UserError
    from diffkd.runs import places

    monkeypatch.setattr(places, "free_space", lambda place: 1000)
    with pytest.raises(UserError, match="no space left in the cache folder"):
        places.check_cache(Path(tmp_path) / "teachers/x")
