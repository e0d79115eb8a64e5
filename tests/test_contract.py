"""A task, method, data and models from outside the package run through the same command."""

from pathlib import Path

HERE = Path(__file__).parent
RECIPE = """
task: {toy}:Dense
data: {{name: "{parts}:scenes", batch_size: 4, workers: 0}}
teacher: {{model: "{parts}:wide"}}
student: {{model: "{parts}:Net"}}
method: {{"{toy}:Mimic": {{weight: 0.5, power: 1}}, diffkd: 1.0}}
taps: {{body: body, "[out]": "[out]"}}
optimizer: {{name: sgd, lr: 0.05}}
trainer: {{epochs: 2, accelerator: cpu}}
"""


def test_a_dense_task_and_a_method_of_ones_own(diffkd, tmp_path):
    assert len((HERE / "toy.py").read_text().splitlines()) < 80
    (tmp_path / "own.yaml").write_text(RECIPE.format(toy=HERE / "toy.py", parts=HERE / "toy_parts.py"))
    status, out, err = diffkd("distill", "own.yaml", "trust=true", "output=a")
    assert status == 0, err
    assert "mIoU" in out
    header = (tmp_path / "a/metrics.csv").read_text().splitlines()[0]
    for column in ("task.cross_entropy", "Mimic.body[fine]", "Mimic.body[coarse]", "diffkd.[out].kd", "miou"):
        assert column in header
    status, out, err = diffkd("evaluate", "a", "trust=true")
    assert status == 0, err
    assert "as recorded" in out
