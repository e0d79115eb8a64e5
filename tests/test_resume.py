"""A stopped run goes on to the bits of the unbroken one, whatever its data and settings."""

import random
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffkd.recipe.schema import load
from diffkd.runs.console import Reporter
from diffkd.runs.folder import RunFolder
from diffkd.training.fit import fit
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
    (place / "photos/train.csv").write_text("\n".join(rows) + "\n")
    (place / "net.py").write_text(NET)
    (place / "own.py").write_text(OWN)
    own = "task: classification\ndata: {name: digits}\nteacher: {model: simple/cnn4}\n"
    (place / "own.yaml").write_text(own + "student: {model: simple/cnn2}\nmethod: kd\n")
    return place


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_on_to_the_same_bits(place, case, monkeypatch):
    monkeypatch.chdir(place)
    seed = time.time_ns() % 10_000
    print(f"the step of the stop is drawn with seed {seed}")  # shown where the test fails
    name = case.replace(" ", "-").replace("'", "")
    recipe, *words = CASES[case]

    def run(folder, *more):
        return fit(load(recipe, [*RUN, *words, f"output={folder}", *more]), Reporter(quiet=True))

    whole = run(f"{name}-whole")
    monkeypatch.setenv("STOP_AT", str(random.Random(seed).randrange(2, 8)))  # the first is the trial's
    with pytest.raises(InterruptedRunError):
        run(f"{name}-broken")
    monkeypatch.delenv("STOP_AT")
    assert not RunFolder(f"{name}-broken").finished
    broken = run(f"{name}-broken", "resume=true")
    ours, theirs = load_file(whole.student_file), load_file(broken.student_file)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    rows = [[row["loss"] for row in folder.read_history()] for folder in (whole, broken)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2
