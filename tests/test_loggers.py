"""Figures go where the recipe says, and no such place can end a run."""

import json

import pytest

from diffkd import UserError
from diffkd.recipe.schema import load
from diffkd.runs.console import Reporter
from diffkd.runs.folder import RunFolder
from diffkd.training import loggers
from diffkd.training.fit import fit

WORDS = [
    "method=none",
    "teacher=null",
    "trainer.max_steps=2",
    "trainer.log_every=1",
    "trainer.accelerator=cpu",
]


def recipe(place, *names):
    return load("digits-8x8", [*WORDS, f"output={place}", f"trainer.loggers={list(names)}"])


def test_one_that_is_not_installed_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed: pip install 'diffkd\[wandb\]'"):
        fit(recipe(tmp_path / "run", "wandb"), Reporter(progress=False))
    assert not (tmp_path / "run").exists()


def test_one_that_fails_is_said_and_left_out(tmp_path, monkeypatch):
    class Failing(loggers.Logger):
        def log(self, figures, step):
            raise ConnectionError("no route\nto host")

        def end(self):
            raise AssertionError("it was left out")

    monkeypatch.setitem(loggers.KINDS, "wandb", Failing)
    said = []
    reporter = Reporter(progress=False)
    monkeypatch.setattr(reporter, "warn", said.append)
    (tmp_path / "run").mkdir()
    both = loggers.Loggers(
        RunFolder(tmp_path / "run"), recipe(tmp_path / "run", "wandb", "tensorboard"), reporter
    )
    both.log({"loss": 1.0}, 1)
    both.log({"loss": 0.5}, 2)
    both.end()
    assert said == ["logger wandb failed, and gets nothing more: no route"]
    assert list((tmp_path / "run").glob("events.out.*"))


def test_mlflow_in_a_file(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    folder = fit(recipe(tmp_path / "run", "mlflow"), Reporter(progress=False))
    client = mlflow.MlflowClient()
    known = json.loads((tmp_path / "run/loggers.json").read_text())["mlflow"]
    assert client.get_run(known).info.status == "FINISHED"
    steps = [metric.step for metric in client.get_metric_history(known, "step/loss")]
    assert steps == [1, 2]
    (top1,) = client.get_metric_history(known, "epoch/top1")
    assert top1.value == folder.read_summary()["last"]["top1"]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit(recipe(tmp_path / "run", "wandb", "tensorboard"), Reporter(progress=False))
    known = json.loads((tmp_path / "run/loggers.json").read_text())["wandb"]
    assert list((tmp_path / "run/wandb").glob(f"offline-run-*/run-{known}.wandb"))
    assert list((tmp_path / "run").glob("events.out.*"))
