"""What the README, the guide and the examples say is run."""

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import box_files

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs/guide.md").read_text(encoding="utf-8")


def blocks(language):
    """Contents of the fenced blocks of one language; "" is those without."""
    parts = [
        part for text in (README, GUIDE) for part in re.split(r"^```(.*)\n", text, flags=re.MULTILINE)[1:]
    ]
    return [body for kind, body in zip(parts[::4], parts[1::4], strict=True) if kind == language]


def commands(language=""):
    """Every diffkd command in the README's blocks of one kind."""
    lines = [line for block in blocks(language) for line in block.splitlines()]
    found = [part.strip() for line in lines for part in line.split("&&")]
    return [command for command in found if command.startswith("diffkd ")]


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    losses = [float(v) for v in re.findall(r"diffusion loss ([\d.]+)", capsys.readouterr().out)]
    assert ("diffusion loss" in block) == (len(losses) == 3)
    assert losses == [] or losses[-1] < losses[0]


# The first run of all is long: these are tests of the commands, not of their accuracy.
SHORT_RUNS = ["trainer.max_steps=3", "trainer.epochs=1"]
FEW_SCENES = ["data.train_scenes=128", "data.test_scenes=100"]


def test_commands_run_in_their_order(diffkd, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "pictures/noise.png")
    assert len(commands()) >= 10
    for command in dict.fromkeys(commands()):
        words = ["seeds=1" if word == "seeds=3" else word for word in command.split()[1:]]
        trains = words[0] in ("distill", "train", "compare")
        words += [*SHORT_RUNS, *FEW_SCENES] if trains else FEW_SCENES if words[0] == "check" else []
        words += ["teacher.train.epochs=1"] if words[0] in ("distill", "compare") else []
        status, out, err = diffkd(*words)
        assert status == 0, f"{command}\n{out}\n{err}"


# What a test machine lacks: time, eight devices, a network for published weights.
SHORT = ["teacher.train=null", "trainer.max_steps=1", "trainer.accelerator=cpu", "data.workers=0"]
LACKING = {"teacher.weights=pretrained": "teacher.weights=null", "trainer.devices=8": "trainer.devices=1"}


UNET = ["teacher=simple/unet4", "student=simple/unet4", "data.crop_size=32"]
FCOS = [f"{side}.model=torchvision/fcos:timm/test_resnet" for side in ("teacher", "student")]
FCOS += [f"{side}.options={{channels: 32, levels: [3, 4]}}" for side in ("teacher", "student")]
SMALL = {
    "folder": ["data.image_size=64", "teacher.weights=null"],
    "imagenet": ["data.image_size=64", "teacher.weights=null"],
    "masks": UNET,
    "boxes": [*FCOS, "data.size=64", "data.max_size=64"],
}


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
    box_files.coco(tmp_path / "cells", {"train": 4, "val": 2})
    for folder in ("images", "masks"):
        (tmp_path / "street" / folder).mkdir(parents=True)
        for i in range(8):
            pixels = random.integers(0, 3 if folder == "masks" else 256, (40, 40), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"street/{folder}/{i}.png")
    found = [command for command in commands("text") if command.startswith("diffkd distill")]
    assert len(found) == 8
    for number, command in enumerate(dict.fromkeys(found)):
        words = [LACKING.get(word, word) for word in shlex.split(command, comments=True)[1:]]
        small = SMALL.get(words[1].partition("/")[0], [])
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
    for folder, text in ((ROOT, README), (ROOT / "docs", GUIDE)):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (folder / target).exists(), target
