"""What the README, the pages of the documentation and the examples say is run, or at least resolved."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from PIL import Image

import box_files
from diffkd.batch import Batch
from diffkd.cli import app
from diffkd.names import load_object
from diffkd.recipe.schema import check_options, load
from diffkd.report import clean, compare
from diffkd.report.listing import listing
from diffkd.report.settings import groups
from diffkd.use.export import ExportOptions

ROOT = Path(__file__).parents[1]
PAGES = {place.name: place.read_text(encoding="utf-8") for place in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8"), **PAGES}


def blocks(language, page=None):
    """Contents of the fenced blocks of one language, of one page or of all; "" is those without."""
    texts = PAGES.values() if page is None else [PAGES[page]]
    parts = [part for text in texts for part in re.split(r"^```(.*)\n", text, flags=re.MULTILINE)[1:]]
    return [body for kind, body in zip(parts[::4], parts[1::4], strict=True) if kind == language]


def commands(language):
    """The words of every diffkd command in the blocks of one kind, each command once."""
    lines = [line for block in blocks(language) for line in block.splitlines()]
    found = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return list(dict.fromkeys(tuple(words[1:]) for words in found if words[:1] == ["diffkd"]))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("python", page)])
def test_python_blocks_run_one_after_the_other(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in blocks("python", page):
        exec(compile(block, page, "exec"), names)
    losses = [float(v) for v in re.findall(r"diffusion loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 3 * ("diffusion loss" in PAGES[page] and page == "own-loop.md")
    assert losses == [] or losses[-1] < losses[0]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with the files that the pages speak of."""
    for word, name in (("def small", "my_models"), ("class MyLoss", "my_losses"), ("def stripes", "my_data")):
        (block,) = [block for block in blocks("python") if word in block]
        (tmp_path / f"{name}.py").write_text(block)
    (task,) = [block for block in blocks("python") if "class Angle" in block]
    (tmp_path / "my_tasks.py").write_text(task)
    (tmp_path / "own.yaml").write_text(*blocks("yaml"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_every_command_is_one_that_there_is(own):
    known = typer.main.get_command(app).commands
    found = [words for kind in ("", "bash", "text") for words in commands(kind)]
    assert len(found) >= 40
    for name, *words in found:
        known[name].make_context(name, list(words))
        if name in ("distill", "train", "check"):
            check_options(load(words[0], words[1:]))
        elif name == "compare":
            compare.Wanted.parse(words[0], words[1:])
        elif name == "export":
            ExportOptions.parse(words[1:])
        elif name in ("settings", "list", "clean"):
            kind = {"settings": groups, "list": listing, "clean": lambda *words: clean.Wanted.parse(words)}
            assert kind[name](*words)


def test_every_line_that_troubleshooting_knows_is_still_said():
    texts = [place.read_text(encoding="utf-8") for place in (ROOT / "src").rglob("*.py")]
    said = re.sub(r'"\n\s*f?"', "", "\n".join(texts))  # strings over several lines
    heads = re.findall(r"^### (.*)$", PAGES["troubleshooting.md"], re.MULTILINE)
    assert len(heads) > 25
    assert [line for head in heads for line in re.findall("`([^`]+)`", head) if line not in said] == []


# The first run of all is long: these are tests of the commands, not of their accuracy.
SHORT_RUNS = ["trainer.max_steps=3", "trainer.epochs=1"]
FEW_SCENES = ["data.train_scenes=128", "data.test_scenes=100"]


def test_commands_run_in_their_order(diffkd, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "pictures/noise.png")
    assert len(commands("")) >= 6
    for command in commands(""):
        words = ["seeds=1" if word == "seeds=3" else word for word in command]
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
    found = [command for command in commands("text") if command[0] == "distill"]
    assert len(found) == 6
    for number, command in enumerate(found):
        words = [LACKING.get(word, word) for word in command]
        small = SMALL.get(words[1].partition("/")[0], [])
        status, _, err = diffkd(*words, *SHORT, *small, "data.batch_size=2", f"output=run{number}")
        assert status == 0, f"{command}\n{err}"


def test_method_data_and_model_of_ones_own_are_compared(diffkd, own):
    words = ["methods=none,my_losses:MyLoss", "seeds=1", "trainer.epochs=1", "teacher.train.epochs=1"]
    words += ["data=my_data.py:stripes", "data.count=64", "student=my_models.py:small"]
    status, out, err = diffkd("compare", "digits", *words)
    assert status == 0, err
    assert "my_losses:MyLoss" in out


def test_the_task_of_ones_own_learns_a_number(own):
    task = load_object("my_tasks.py:Angle")(None)
    batch, metrics = Batch(None, torch.tensor([1, 3])), task.metrics()
    assert task.loss(torch.zeros(2, 1), batch)["squares"] == 5
    task.update(metrics, torch.zeros(2, 1), batch)
    assert metrics.compute()["error"] == 2


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


def test_the_packages_description_needs_no_file_beside_it(monkeypatch):
    hook = SimpleNamespace(MetadataHookInterface=object)  # what builds the package is not at hand here
    monkeypatch.setitem(sys.modules, "hatchling.metadata.plugin.interface", hook)
    standalone = runpy.run_path(str(ROOT / "docs/package_readme.py"))["standalone"]
    relative = re.compile(r"\]\((?!\w+:)[^)]+\)")
    alone = standalone(PAGES["README.md"])
    assert relative.search(PAGES["README.md"])
    assert not relative.search(alone)
    assert "speed (`docs/speed.md`)" in alone
    assert "pip download --no-deps" in alone
    there = standalone(PAGES["README.md"], "https://example.org/diffkd")
    assert not relative.search(there)
    assert "(https://example.org/diffkd/blob/main/docs/speed.md)" in there
    assert "(https://example.org/diffkd/raw/main/docs/diffkd.svg)" in there
    assert blocks("python", "README.md") == re.findall(r"^```python\n(.*?)^```$", alone, re.M | re.S)


def test_links_to_files_lead_somewhere():
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
            assert (folder / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("place", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda place: place.stem)
def test_what_a_benchmark_imports_is_there(place, monkeypatch):
    monkeypatch.syspath_prepend(place.parent)  # as running the file does
    assert callable(runpy.run_path(str(place), run_name="imported")["main"])
