"""The commands as Python functions."""

import threading

import pytest
from PIL import Image

import diffkd
from diffkd import UserError

SMALL = {"epochs": 2, "accelerator": "cpu", "threads": 1}


def test_a_run_in_python_is_the_commands_run(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    run = diffkd.distill(
        str(tiny), lambda run, row: seen.append((run.folder, row["top1"])), seed=3, output="a"
    )
    assert [top1 for _, top1 in seen] == [row["top1"] for row in run.history]
    assert len(seen) == 2
    assert run.metrics["top1"] == run.summary["last"]["top1"] == seen[-1][1]
    Image.new("L", (8, 8), 200).save("white.png")
    (row,) = run.predict("white.png").rows
    assert row["class"] in run.student.class_names
    assert run.best_student.config["figures"]["top1"] == run.summary["best"]["top1"]
    assert run.evaluate(tmp_path / "found")["top1"] == run.metrics["top1"]
    assert "Where it errs" in run.page.read_text()


def test_overrides_are_the_command_lines(tmp_path, tiny):
    run = diffkd.train(str(tiny), trainer=SMALL | {"epochs": 1}, **{"data.shift": 0}, output=tmp_path / "a")
    assert run.summary["methods"] == []
    assert len(run.history) == 1
    with pytest.raises(UserError, match=r"trainer.epochs: needs"):
        diffkd.train(str(tiny), trainer={"epochs": 0}, output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_run_in_a_thread(tmp_path, tiny):
    found = []
    work = threading.Thread(
        target=lambda: found.append(diffkd.train(str(tiny), trainer={"epochs": 1}, output=tmp_path / "a"))
    )
    work.start()
    work.join(120)
    assert found[0].metrics["top1"] >= 0


def test_a_comparison_in_python(tmp_path, tiny):
    found = diffkd.compare(
        str(tiny), ["none", "kd"], seeds=[4], output=tmp_path / "c", trainer={"max_steps": 1}
    )
    assert [method["name"] for method in found.figures["methods"]] == ["none", "kd"]
    assert found.figures["seeds"] == [4]
    assert "| kd |" in found.table
    assert [run.folder.name for run in found.runs] == ["kd-seed4", "none-seed4"]
    assert found.page.is_file()
