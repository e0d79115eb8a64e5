"""A stopped run goes on to the bits of the unbroken one, whatever its data and settings."""

import os
import random
import shutil
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies.ddp import DDPStrategy
from PIL import Image
from safetensors.torch import load_file

from diffkd.recipe.schema import load
from diffkd.runs.console import Reporter
from diffkd.runs.folder import RunFolder
from diffkd.training import fit as fit_file
from diffkd.training.fit import _fit, fit
from diffkd.training.interrupt import InterruptedRunError

# A student with all that draws and remembers; it asks its process to stop in its STOP_AT-th step.
NET = """
import os, signal
from torch import nn

class Net(nn.Sequential):
    steps = 0

    def forward(self, images):
        self.steps += self.training
        if self.training and self.steps == int(os.environ.get("STOP_AT", "0")):
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().forward(images)

def net(num_classes):
    body = nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()
    return Net(*body, nn.Linear(64, num_classes))
"""
OWN = """
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2
from diffkd import Data

class Some(Dataset):
    def __init__(self, count, transform):
        self.count, self.transform = count, transform

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i))
        return self.transform(picture) + torch.rand(()) / 8, i % 2

def build():
    return Data(Some(22, v2.RandomHorizontalFlip()), Some(4, v2.Identity()), 2, (3, 16, 16))
"""
PHOTOS = ["folder", "data.root=photos", "data.image_size=16", "teacher.train=null"]
CASES = {
    "photos": [*PHOTOS, "data.workers=0", "trainer.ema=0.9", "schedule=cosine"],
    "photos by a loader process": [*PHOTOS, "data.workers=1", "trainer.accumulate=2"],
    "a list of photos": [*PHOTOS, "data=table", "data.root=photos", "data.workers=0", "optimizer=adamw"],
    "data of one's own": ["own.yaml", "data=own.py:build", "data.workers=0", "trainer.precision=bf16"],
    "a Hugging Face set": ["folder", *PHOTOS[2:], "data=huggingface", "data.root=hub"],
    "data of one's own, mixed": ["own.yaml", "data=own.py:build", "data.workers=1", "data.mixup=0.5"],
}
RUN = [
    "teacher.model=simple/cnn4",
    "student=net.py:net",
    "method={diffkd: {num_steps: 2}}",
    "taps={'0': stage1}",
]
RUN += ["data.batch_size=4", "trainer.accelerator=cpu", "trainer.threads=1", "trainer.epochs=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place, draw = tmp_path_factory.mktemp("resume"), np.random.default_rng(0)
    rows = ["path,label"]
    for kind in ("cat", "dog"):
        (place / "photos" / kind).mkdir(parents=True)
        for i in range(12):
            pixels = draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "photos" / kind / f"{i}.png")
            rows.append(f"{kind}/{i}.png,{kind}")
    shutil.copytree(place / "photos", place / "hub")
    (place / "photos/train.csv").write_text("\n".join(rows) + "\n")
    (place / "net.py").write_text(NET)
    (place / "own.py").write_text(OWN)
    own = "task: classification\ndata: {name: digits}\nteacher: {model: simple/cnn4}\n"
    (place / "own.yaml").write_text(own + "student: {model: simple/cnn2}\nmethod: kd\n")
    return place


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_on_to_the_same_bits(place, case, monkeypatch):
    monkeypatch.chdir(place)
    if case == "a Hugging Face set":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    stop = drawn_step()
    name = case.replace(" ", "-").replace("'", "")
    recipe, *words = CASES[case]

    def run(folder, *more):
        return fit(load(recipe, [*RUN, *words, f"output={folder}", *more]), Reporter(quiet=True))

    whole = run(f"{name}-whole")
    monkeypatch.setenv("STOP_AT", str(stop))
    with pytest.raises(InterruptedRunError):
        run(f"{name}-broken")
    monkeypatch.delenv("STOP_AT")
    assert not RunFolder(f"{name}-broken").finished
    check_same(whole, run(f"{name}-broken", "resume=true"))


def drawn_step():
    seed = time.time_ns() % 10_000
    print(f"the step of the stop is drawn with seed {seed}")  # shown where the test fails
    return random.Random(seed).randrange(2, 8)  # the first is the trial's


def check_same(whole, broken, rel=0.0):
    ours, theirs = load_file(whole.student_file), load_file(broken.student_file)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    rows = [[row["loss"] for row in folder.read_history()] for folder in (whole, broken)]
    assert rows[1] == pytest.approx(rows[0], rel=rel, abs=0)
    assert len(rows[0]) == 2


def worker(fabric, place, stop):
    """One run unbroken, one stopped and gone on with, by two processes."""
    os.chdir(place)
    torch.set_num_threads(1)
    words = [*RUN, *CASES["photos"][1:], "data.mixup=0.8", "trainer.log_every=1"]
    for folder, at in (("two-whole", 0), ("two-broken", stop), ("two-broken", 0)):
        os.environ["STOP_AT"] = str(at)
        recipe = load("folder", [*words, f"output={folder}", "resume=true"])
        with pytest.raises(InterruptedRunError) if at else nullcontext():
            _fit(recipe, fabric, Reporter(quiet=True, active=fabric.is_global_zero))


def test_two_processes_go_on_to_the_same_bits_too(place):
    strategy = DDPStrategy(start_method="forkserver")
    Fabric(accelerator="cpu", devices=2, strategy=strategy).launch(worker, place, drawn_step())
    # an epoch's mean loss is added up in another order: processes first, then its two parts
    check_same(RunFolder(place / "two-whole"), RunFolder(place / "two-broken"), rel=1e-14)


def scaling_fabric(recipe):
    """Half precision with a scaler of gradients, as accelerators have it, on the processor."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
    return Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler))


def test_half_precision_goes_on_with_its_scale(place, monkeypatch):
    """The scale begins too high, so that steps are left out until it fits; then it grows again."""
    monkeypatch.setattr(fit_file, "make_fabric", scaling_fabric)
    monkeypatch.chdir(place)
    stop, words = drawn_step(), [*RUN, *CASES["photos"][1:], "trainer.keep=all"]

    def run(folder):
        return fit(load("folder", [*words, f"output={folder}", "resume=true"]), Reporter(quiet=True))

    whole = run("half-whole")
    monkeypatch.setenv("STOP_AT", str(stop))
    with pytest.raises(InterruptedRunError):
        run("half-broken")
    saved = torch.load(RunFolder("half-broken").list_checkpoints()[-1], weights_only=True)["precision"]
    assert saved["scale"] < 2.0**40
    monkeypatch.delenv("STOP_AT")
    check_same(whole, run("half-broken"))
