import sys
from pathlib import Path

import pytest
import torch

from diffkd.cli import main
from processes import Command

ROOT = Path(__file__).parents[1]

# A recipe that trains in a second: a teacher with fresh weights, few steps.
TINY = """
task: classification
data: {name: digits, batch_size: 256}
teacher: {model: simple/cnn8}
student: {model: simple/cnn4}
method: {diffkd: {num_steps: 2}}
optimizer: {name: sgd, lr: 0.02, momentum: 0.9, weight_decay: 5.0e-4}
schedule: {name: cosine}
trainer: {epochs: 2, accelerator: cpu, log_every: 1, threads: 1}
seed: 0
"""


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """Nothing of the person's own cache is read or written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFKD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True)
def _quiet_machine():
    """Two tests do not fight for cores."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny(tmp_path):
    """The tiny recipe as a file."""
    place = tmp_path / "tiny.yaml"
    place.write_text(TINY)
    return place


def start(*words, cwd, **env):
    """The command line in a process of its own."""
    return Command(words, cwd, {"CUDA_VISIBLE_DEVICES": "", **env})


@pytest.fixture
def diffkd(tmp_path, monkeypatch, capsys):
    """Runs a diffkd command in an empty folder; gives exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words, **env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["diffkd", *map(str, words)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err

    return run
