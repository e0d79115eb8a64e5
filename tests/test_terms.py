"""Comparisons are on equal terms: what belongs to distillation leaves teachers and controls alone."""

import json

import pytest
import torch

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
