"""The best epoch's student, runs that end early, and what is told while they run."""

import json
import os
import stat
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from diffkd import UserError, load_student
from diffkd.assembly import assemble
from diffkd.recipe.schema import load
from diffkd.recipe.sides import Side
from diffkd.runs import bar as bars
from diffkd.runs.bar import ProgressBar
from diffkd.runs.console import Reporter
from diffkd.runs.folder import RunFolder
from diffkd.training.evaluation import evaluate
from diffkd.training.fit import fit

WORDS = ["method=none", "teacher=null", "trainer.accelerator=cpu", "trainer.threads=1", "data.batch_size=256"]


def run(place, *words, reporter=None):
    recipe = load("digits-8x8", [*WORDS, f"output={place}", *words])
    return recipe, fit(recipe, reporter or Reporter(progress=False))


@pytest.fixture(scope="module")
def worse(tmp_path_factory):
    """A run that is worst at its end, where its rate leaps; the best epoch is chosen on a part held out."""
    place = tmp_path_factory.mktemp("runs") / "a"
    words = ["data.val_fraction=0.2", "trainer.epochs=3", "trainer.ema=0.5", "trainer.clip_grad_norm=1"]
    rate = ["optimizer.lr=0.05", "data.batch_size=64", "schedule={name: step, milestones: [2], factor: 200}"]
    return run(place, *words, *rate)


def test_the_best_epochs_student_ships_beside_the_last(worse):
    recipe, folder = worse
    history, summary = folder.read_history(), folder.read_summary()
    best = max(history, key=lambda row: row["val_top1"])
    assert summary["chosen_on"] == "val"
    assert best is not history[-1]
    assert (summary["best"]["epoch"], summary["best"]["top1"]) == (best["epoch"], best["top1"])
    parts = assemble(recipe, with_teacher=False)
    for which, row in (("best", best), ("last", history[-1])):
        student = load_student(folder.path, which=which)
        side = Side("student", student.model, student.prepare)
        for split, key in ((parts.data.test, "top1"), (parts.data.val, "val_top1")):
            figures = evaluate(side, parts.task, parts.loader(split, shuffle=False))
            assert figures.scalars["top1"] == row[key]
        assert student.config["figures"]["top1"] == row["top1"]
    assert load_student(folder.path, which="best").config["chosen_on"] == "val"
    with pytest.raises(UserError, match="which=worst: needs last or best"):
        load_student(folder.path, which="worst")


def test_a_damaged_best_student_is_noticed_and_all_files_are_for_the_group(worse, tmp_path):
    _, folder = worse
    umask = os.umask(0)
    os.umask(umask)
    for place in folder.path.rglob("*"):
        if place.is_file() and place.name not in (".lock",):
            assert stat.S_IMODE(place.stat().st_mode) == 0o666 & ~umask, place
    checked = json.loads((folder.path / "checksums.json").read_text())
    assert "student-best/model.safetensors" in checked


def test_patience_ends_a_run_and_a_resumed_run_alike(tmp_path, monkeypatch):
    from diffkd.training.trainer import Trainer

    words = ["trainer.epochs=9", "optimizer.lr=1e-9", "trainer.patience=2"]
    _, whole = run(tmp_path / "whole", *words)
    assert len(whole.read_history()) == 3
    assert "no better on the test data for 2 evaluations" in whole.read_summary()["ended"]
    assert whole.read_summary()["best"]["epoch"] == 1
    step = Trainer._step

    def dies(self, batch, place, updates):
        if place.step == 12:
            raise KeyboardInterrupt
        return step(self, batch, place, updates)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", *words)
    _, cut = run(tmp_path / "cut", *words, "resume=true")
    rows = [[row["top1"] for row in folder.read_history()] for folder in (whole, cut)]
    assert rows[0] == rows[1]
    states = [load_student(folder.path).model.state_dict() for folder in (whole, cut)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_run_ends_with_its_minutes_and_has_a_figure(tmp_path):
    _, folder = run(tmp_path / "a", "trainer.epochs=50", "trainer.max_minutes=0.001")
    summary = folder.read_summary()
    assert 0 < summary["steps"] < 250
    assert summary["ended"] == "trainer.max_minutes=0.001 are over"
    assert folder.read_history()[-1]["step"] == summary["steps"]
    assert RunFolder(folder.path).damage() is None


def test_a_teacher_is_made_without_the_runs_limits():
    recipe = load("digits-8x8", ["trainer.patience=2", "trainer.max_minutes=1"])
    assert recipe.teacher_recipe().trainer == load("digits-8x8").teacher_recipe().trainer


def test_a_bar_is_whole_at_80_columns():
    screen = Console(width=80, force_terminal=True)
    bar = ProgressBar(screen, 240, 0, "diffkd+dkd, seed 0 (3/12)")
    bar._start -= 100.0
    bar.step(60, 640)
    bar.show("epoch 60/240", {"loss": 1.25, "task.cross_entropy": 1.0, "diffkd.layer4.kd": 0.25})
    line = bar.line(80)
    assert line.startswith("diffkd+dkd, seed 0 (3/12) epoch 60/240   25 %  5 min")
    assert len(line) <= 80
    assert "cross_entropy 1.000" in bar.line(160)
    bar.aside("testing 3/40")
    assert "epoch 60/240 testing 3/40   25 %" in bar.line(80)
    assert bar.line(30).endswith("left")
    with screen.capture() as captured:
        screen.print(bar)
    assert captured.get().count("\n") == 1


def test_a_notebook_shows_the_line_without_widgets(monkeypatch):
    shown = []
    handle = SimpleNamespace(update=lambda content, raw: shown.append(content["text/plain"]))
    fake = SimpleNamespace(display=lambda content, **_: shown.append(content["text/plain"]) or handle)
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    with ProgressBar(Console(force_jupyter=True), 4) as bar:
        bar.step(2, 16)
        bar.step(2, 16)
    assert [line.split("%")[0].strip() for line in shown] == ["0", "50", "100"]
    assert "━" in shown[1]


def test_a_log_gets_the_figure_of_each_epoch_and_a_line_a_minute(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bars, "MINUTE", 0.0)
    monkeypatch.setattr(bars, "_SURE", 0.0)
    _, folder = run(tmp_path / "a", "trainer.epochs=2", "trainer.log_every=2", reporter=Reporter())
    said = capsys.readouterr().err
    top1 = folder.read_history()[0]["top1"]
    assert f"epoch 1/2: top-1 {100 * top1:.2f} %" in said
    assert "on this machine (" in said
    lines = [line for line in said.splitlines() if " left" in line]
    assert "img/s" in lines[0]
    assert any("testing" in line for line in lines)
    assert "on this machine" in (folder.path / "log.txt").read_text()
