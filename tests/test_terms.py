"""Comparisons are on equal terms: what belongs to distillation leaves teachers and controls alone."""

import json
import shlex
import time

import pytest
import torch
from torch import nn

from diffkd.assembly import assemble
from diffkd.maths.randomness import seed_everything
from diffkd.recipe.schema import load
from diffkd.runs.identity import difference

LIGHT = "task.weight=0.1"


def _first_losses(tiny, *words):
    recipe = load(str(tiny), words)
    seed_everything(0)
    parts = assemble(recipe, with_teacher=bool(recipe.method))
    step = parts.step(parts.distiller(parts.sample(2))[0])
    with torch.no_grad():
        return step(parts.sample(16))


def test_a_made_teacher_trains_with_weight_one(tiny):
    recipe = load(str(tiny), ["method=kd", "teacher.train.epochs=1", LIGHT])
    plain = load(str(tiny), ["method=kd", "teacher.train.epochs=1"])
    assert recipe.teacher_recipe().task.weight == 1
    assert difference(recipe.teacher_recipe(), plain.teacher_recipe()) is None


@pytest.mark.parametrize(("method", "factor"), [("none", 1.0), ("kd", 0.1)])
def test_the_weight_counts_where_something_is_distilled(method, factor, tiny):
    light, plain = (_first_losses(tiny, f"method={method}", *words) for words in ([LIGHT], []))
    name = "task.cross_entropy"
    torch.testing.assert_close(light[name], factor * plain[name])
    recipes = [load(str(tiny), [f"method={method}", *words]) for words in ([LIGHT], [])]
    assert (difference(*recipes) is None) is (factor == 1)


def test_a_control_at_another_weight_is_the_same_run(tiny, diffkd, tmp_path):
    assert diffkd("train", tiny, "output=a", "trainer.epochs=1")[0] == 0
    status, _, err = diffkd("train", tiny, "output=a", "trainer.epochs=1", LIGHT, "resume=true")
    assert status == 0, err
    assert diffkd("train", tiny, "output=b", "trainer.epochs=1", LIGHT)[0] == 0
    one, other = (json.loads((tmp_path / f"{n}/summary.json").read_text())["last"] for n in "ab")
    assert one == other


def test_the_control_is_found_or_how_to_make_it_is_said(tiny, diffkd, tmp_path):
    """The command that is said makes the run that the same distillation then shows, with the gain."""
    words = ["distill", tiny, "method=kd", LIGHT, "trainer.epochs=1"]
    status, out, _ = diffkd(*words, "output=a")
    assert status == 0
    assert "gain" not in out
    (hint,) = (line for line in out.splitlines() if line.startswith("student alone"))
    command = shlex.split(hint.partition(": diffkd ")[2])
    assert diffkd(*command)[0] == 0
    assert (tmp_path / "a-alone/summary.json").is_file()
    status, out, _ = diffkd(*words, "output=a", "resume=true")
    assert status == 0
    scores = [_score(tmp_path / name) for name in ("a", "a-alone")]
    assert f"gain over the student alone: {100 * (scores[0] - scores[1]):+.2f} points" in out
    assert f"{100 * scores[1]:.2f} %" in next(line for line in out.splitlines() if "student alone" in line)


def test_the_control_is_trained_on_request_and_belongs_to_its_own_recipe(tiny, diffkd, tmp_path):
    words = ["distill", tiny, "method=kd", "trainer.epochs=1", "control=true"]
    status, out, err = diffkd(*words, "output=a")
    assert status == 0, err
    assert "gain over the student alone" in out
    assert "control" not in (tmp_path / "a/recipe.yaml").read_text()
    assert diffkd("train", tiny, "output=b", "trainer.epochs=1")[0] == 0
    assert _score(tmp_path / "a-alone") == _score(tmp_path / "b")
    for other in (["seed=1"], ["optimizer.lr=0.01"]):
        stamp = (tmp_path / "a-alone/summary.json").stat().st_mtime_ns
        status, _, err = diffkd(*words, "output=a", "resume=true", *other)
        assert status == 2
        assert err.count("\n") == 1
        assert (tmp_path / "a-alone/summary.json").stat().st_mtime_ns == stamp


def test_the_usual_place_of_a_control_is_looked_at(tiny, diffkd):
    assert diffkd("train", tiny, "trainer.epochs=1")[0] == 0
    status, out, _ = diffkd("distill", tiny, "method=kd", "trainer.epochs=1", "output=elsewhere/a")
    assert status == 0
    assert "gain over the student alone" in out
    status, out, _ = diffkd("distill", tiny, "method=kd", "trainer.epochs=1", "output=b", "optimizer.lr=0.01")
    assert status == 0
    assert "gain" not in out


def _score(folder):
    return json.loads((folder / "summary.json").read_text())["last"]["top1"]


def test_time_is_taken_on_one_thread_after_warming_up():
    from diffkd.models.measure import milliseconds

    calls = []
    torch.set_num_threads(2)
    slow = iter([0.05, 0.05, 0.05])

    def forward():
        calls.append(torch.get_num_threads())
        time.sleep(next(slow, 0.001))

    assert milliseconds(forward, torch.device("cpu"), budget=0.02) < 20
    assert set(calls) == {1}
    assert torch.get_num_threads() == 2


def test_multiply_adds_are_counted_without_the_compiler():
    from diffkd.models.measure import _Macs, macs

    x = torch.rand(2, 3, 5, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    projections, scores = 15 * 8 * 32, 3 * 5 * 5 * 16
    for forward, known in (
        (lambda: x @ x.mT, 6 * 5 * 8 * 5),
        (lambda: nn.Linear(8, 4)(x), 240 * 4),
        (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3)(x), 2 * 6 * 5 * 8 * 9),
        (lambda: nn.ConvTranspose2d(3, 4, 2)(x), 240 * 4 * 4),
        (lambda: nn.functional.scaled_dot_product_attention(x, x, x), 6 * 5 * 5 * 16),
        (lambda: attention(x[0], x[0], x[0]), projections + scores),
        (lambda: layer(x[0]), projections + scores + 2 * 15 * 8 * 16),
        (lambda: torch.inference_mode()(attention)(x[0], x[0], x[0]), projections + scores),
    ):
        assert macs(forward) == known
    assert torch.backends.mha.get_fastpath_enabled()
    # what a mode defines itself is wrapped, and the wrapper imports the compiler: most of a check's start
    assert not hasattr(_Macs.__torch_dispatch__, "__wrapped__")
