"""A task of one's own whose roles differ: a detector in a file, from training to the comparison."""

import json
from pathlib import Path

import pytest

from diffkd.assembly import assemble
from diffkd.recipe.schema import load

HERE = Path(__file__).with_name("my_boxes.py")
RECIPE = f"""
task: {{name: "{HERE}:MyTask"}}
data: {{name: "{HERE}:squares", batch_size: 8, workers: 0}}
teacher: {{model: "{HERE}:wide"}}
student: {{model: "{HERE}:Detector"}}
method: {{fitnet: 1.0}}
optimizer: {{name: adamw, lr: 0.003}}
trainer: {{epochs: 3, accelerator: cpu, threads: 1, log_every: 1, progress: false}}
"""


@pytest.fixture
def recipe(tmp_path):
    place = tmp_path / "boxes.yaml"
    place.write_text(RECIPE)
    return place


def test_a_detector_of_ones_own_is_distilled_and_evaluated(diffkd, recipe, tmp_path):
    status, said, error = diffkd("distill", recipe, "trust=true", "output=run")
    assert status == 0, error
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert {"task.box", "iou"} <= set(rows[0].split(","))
    losses = [float(row.split(",")[rows[0].split(",").index("task.box")]) for row in rows[1:]]
    assert losses[-1] < losses[0]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert 0 < summary["last"]["iou"] <= 1
    status, said, error = diffkd("evaluate", "run", "trust=true")
    assert status == 0, error
    assert f"iou {100 * summary['last']['iou']:.2f} %" in said
    assert "as recorded" in said


def test_a_detector_of_ones_own_is_compared(diffkd, recipe, tmp_path):
    status, said, error = diffkd(
        "compare", recipe, "trust=true", "methods=none,fitnet", "seeds=1", "trainer.epochs=1"
    )
    assert status == 0, error
    assert "IoU" in said


def test_the_teacher_gives_no_answers_while_a_student_learns(recipe):
    parts = assemble(load(str(recipe), ["trust=true"]))
    distiller, _ = parts.distiller(parts.sample(2))
    batch = next(iter(parts.loader(parts.data.train, shuffle=True).epoch()))
    losses = distiller.train()(batch)
    assert set(losses.supervised) == {"box"}
    assert all(loss.requires_grad for loss in losses.values())
    assert parts.teacher.model.answered == 0
    [pair] = distiller.pairs
    assert pair.student.shape == (4, 8, 8)  # of the resized picture
