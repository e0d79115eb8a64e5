"""What the README and the examples say is run."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    """Contents of the fenced blocks of one language; "" is those without."""
    parts = re.split(r"^```(.*)\n", README, flags=re.MULTILINE)
    return [body for kind, body in zip(parts[1::4], parts[2::4], strict=True) if kind == language]


def commands(language=""):
    """Every diffkd command in the README's blocks of one kind."""
    lines = [line for block in blocks(language) for line in block.splitlines()]
    found = [part.strip() for line in lines for part in line.split("&&")]
    return [command for command in found if command.startswith("diffkd ")]


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block, capsys):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    losses = [float(v) for v in re.findall(r"diffusion loss ([\d.]+)", capsys.readouterr().out)]
    assert ("diffusion loss" in block) == (len(losses) == 3)
    assert losses == [] or losses[-1] < losses[0]


def test_commands_run_in_their_order(diffkd):
    assert len(commands()) >= 5
    for command in commands():
        words = command.split()[1:]
        # The first run of all is long: a test of the command, not of its accuracy.
        short = ["trainer.epochs=2"] if words[0] in ("distill", "train", "compare") else []
        made = ["teacher.train.epochs=2"] if words[0] in ("distill", "compare") else []
        status, out, err = diffkd(*words, *made, *short)
        assert status == 0, f"{command}\n{out}\n{err}"


# What a test machine lacks: time, eight devices, a network for published weights.
SHORT = ["teacher.train=null", "trainer.max_steps=1", "trainer.accelerator=cpu", "data.workers=0"]
LACKING = {"teacher.weights=pretrained": "teacher.weights=null", "trainer.devices=8": "trainer.devices=1"}


def test_commands_for_data_of_ones_own(diffkd, tmp_path):
    random = np.random.default_rng(0)
    for folder in ("photos", "data/imagenet/train", "data/imagenet/val"):
        for kind in ("cat", "dog"):
            (tmp_path / folder / kind).mkdir(parents=True)
            for i in range(4):
                noise = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / folder / kind / f"{i}.png")
    (tmp_path / "data/cifar100").mkdir()
    for split in ("train", "test"):
        x = random.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"data/cifar100/{split}.npz", x=x, y=np.arange(8))
    found = [command for command in commands("text") if command.startswith("diffkd distill")]
    assert len(found) == 4
    for number, command in enumerate(found):
        words = [LACKING.get(word, word) for word in command.split()[1:] if "batch_size" not in word]
        small = [] if "cifar100" in command else ["data.image_size=64", "teacher.weights=null"]
        status, _, err = diffkd(*words, *SHORT, *small, "data.batch_size=2", f"output=run{number}")
        assert status == 0, f"{command}\n{err}"


def test_the_method_of_ones_own_is_compared(diffkd, tmp_path):
    (block,) = [block for block in blocks("python") if "class MyLoss" in block]
    (tmp_path / "my_losses.py").write_text(block)
    words = ["methods=none,my_losses:MyLoss", "seeds=1", "trainer.epochs=1", "teacher.train.epochs=1"]
    status, out, err = diffkd("compare", "digits", *words)
    assert status == 0, err
    assert "my_losses:MyLoss" in out


def test_the_recipe_of_ones_own_runs(diffkd, tmp_path):
    (recipe,) = blocks("yaml")
    (tmp_path / "own.yaml").write_text(recipe)
    (tmp_path / "my_models.py").write_text(
        "from functools import partial\n"
        "from diffkd.models.simple import SimpleCNN\n"
        "def big(num_classes, in_channels): return SimpleCNN(16, in_channels, num_classes)\n"
        "def small(num_classes, in_channels): return SimpleCNN(4, in_channels, num_classes)\n"
    )
    status, _, err = diffkd("train", "own.yaml", "student=my_models.py:big", "output=big", "trainer.epochs=1")
    assert status == 0, err
    (tmp_path / "big.safetensors").write_bytes((tmp_path / "big/student/model.safetensors").read_bytes())
    status, _, err = diffkd("distill", "own.yaml", "trainer.epochs=1", "output=small", "trust=true")
    assert status == 0, err


@pytest.mark.parametrize("place", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run(place):
    runpy.run_path(str(place), run_name="__main__")


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
