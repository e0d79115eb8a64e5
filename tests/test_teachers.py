"""Several teachers in a recipe: made, kept, weighted, judged and told apart."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffkd.assembly import assemble
from diffkd.errors import UserError
from diffkd.maths.losses import kl_divergence
from diffkd.recipe.files import code_names
from diffkd.recipe.schema import dump, load
from diffkd.report import compare
from diffkd.report.similarity import similarity
from diffkd.runs.folder import RunFolder
from diffkd.runs.identity import difference, identify
from diffkd.training.teacher import _say_why

WIDE = ["teachers.wide=simple/cnn8", "teachers.wide.share=3"]
SHORT = ["teacher.model=simple/cnn4", "student=simple/cnn2", "trainer.epochs=1", "trainer.accelerator=cpu"]
SHORT += ["teacher.train.epochs=1", "trainer.threads=1", "data.batch_size=512", "method=kd", "data.limit=512"]


def recipe(*words):
    return load("digits-8x8", [*SHORT, *WIDE, *words])


def test_a_recipe_names_further_teachers_in_short_and_in_full(tmp_path):
    found = recipe("teachers.wide.train={epochs: 2, optimizer: adamw}", "teachers.wide.weights=2024")
    wide = found.teachers["wide"]
    assert (wide.model, wide.share, wide.weights, wide.train.epochs) == ("simple/cnn8", 3, "2024", 2)
    assert wide.train.optimizer.name == "adamw"
    assert list(found.every_teacher) == ["teacher", "wide"]
    (tmp_path / "again.yaml").write_text(dump(found))
    assert load(str(tmp_path / "again.yaml")).teachers == found.teachers
    made = found.teacher_recipe("wide")
    assert (made.student.model, made.teachers, made.trainer.epochs) == ("simple/cnn8", {}, 2)
    assert not load("digits-8x8", [*WIDE, "method=none", "teacher=null"]).teachers


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["teachers.a-b=simple/cnn2"], "words of letters, digits and _, not 'a-b'"),
        (["teachers.teacher=simple/cnn2"], "not 'teacher'"),
        (["teachers.wide.shaer=1"], "did you mean 'share'"),
        (["teachers.wide.share=0"], r"teachers.wide.share"),
    ],
)
def test_what_is_no_teacher_is_one_line(words, line):
    with pytest.raises(UserError, match=line) as caught:
        recipe(*words)
    assert "\n" not in str(caught.value)


def test_further_teachers_need_a_first():
    with pytest.raises(UserError, match="teachers are further ones beside teacher"):
        load("digits-8x8", [*WIDE, "teacher=null", "method=kd"])


def test_code_named_by_a_teacher_needs_trust():
    assert ("teachers.model", "os:system") in list(code_names({"teachers": {"x": {"model": "os:system"}}}))


def test_the_students_run_depends_on_every_teacher_and_a_lone_one_counts_as_ever():
    assert identify(recipe(), {}) == identify(recipe(), {})
    assert difference(recipe(), recipe("teachers.wide.share=1")) is not None
    assert difference(recipe(), load("digits-8x8", SHORT)) is not None
    shares = [load("digits-8x8", [*SHORT, f"teacher.share={n}"]) for n in (1, 2)]
    assert difference(*shares) is None


def test_each_teachers_losses_weigh_by_its_share():
    torch.manual_seed(0)
    parts = assemble(recipe("teacher.train=null", "teachers.wide.train=null"))
    sample = parts.sample(6)
    distiller, _ = parts.distiller(sample)
    assert distiller.weights == {"kd_teacher": pytest.approx(0.9 / 4), "kd_wide": pytest.approx(0.9 * 3 / 4)}
    losses = distiller.eval()(sample)
    for name, weight in distiller.weights.items():
        side = parts.teachers[name.removeprefix("kd_")]
        expected = weight * kl_divergence(losses.output, side.forward(parts.task, sample), 4.0)
        torch.testing.assert_close(losses[f"{name}.output.kd"], expected)
    lines = list(parts.account(distiller))
    assert any("<- teacher output" in line for line in lines)
    assert any("<- wide output" in line for line in lines)


def test_each_teacher_may_have_taps_of_its_own():
    alone = ["teacher.train=null", "teachers.wide.train=null", "method=fitnet"]
    parts = assemble(
        recipe(*alone, "taps={teacher: {stage3: stage3}, wide: {stage3: stage3, stage2: stage2}}")
    )
    distiller, _ = parts.distiller(parts.sample(6))
    assert [len(pairs) for pairs in distiller.pairs_by_teacher.values()] == [1, 2]
    assert parts.recipe.taps_of() == {"stage3": "stage3"}
    assert recipe("taps={stage3: stage2}").taps_of("wide") == {"stage3": "stage2"}
    with pytest.raises(UserError, match=r"name each of them once \(teacher, wide\), not wdie"):
        recipe("taps={wdie: {stage3: stage3}}")


def test_another_teacher_of_the_same_model_is_told_apart(tmp_path, monkeypatch):
    for number, place in enumerate(("net-old", "net-new")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "recipe.yaml").write_text(dump(recipe().teacher_recipe()))
        (tmp_path / place / "identity.json").write_text(json.dumps({"data": {"x": str(number)}}))
    said, reporter = [], SimpleNamespace(note=lambda line: said.append(line))
    for epochs in (1, 7):
        wanted = recipe(f"teacher.train.epochs={epochs}").teacher_recipe()
        _say_why(tmp_path / "net-x", wanted, {"data": {"x": "2"}}, reporter)
    assert "was made on other data" in said[0]
    assert said[1].endswith("is another: trainer.epochs is 1 there and 7 here")


def test_a_comparison_says_whose_features_are_compared(monkeypatch):
    monkeypatch.setattr(compare, "similarity", lambda *_: {"tap": {"before": 0.5, "after": None}})
    notes = []
    for teachers in ({"wide": None}, {"wide": None}, {}):
        run = SimpleNamespace(folder=None, recipe=SimpleNamespace(teachers=teachers))
        assert compare._similarity(run, None, notes)
    assert notes == ["features are compared with the first teacher's; there were several"]


def test_a_run_makes_both_once_tells_them_apart_and_resumes(diffkd, tmp_path):
    words = ["distill", "digits-8x8", *SHORT, *WIDE, "teachers.wide.train={epochs: 1}"]
    env = {"DIFFKD_CACHE": str(tmp_path / "cache")}
    status, out, err = diffkd(*words, "output=a", **env)
    assert status == 0, err
    assert len(list((tmp_path / "cache/teachers").glob("*/student"))) == 2
    assert [line for line in out.splitlines() if "wide" in line and "simple/cnn8" in line], out
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["teacher"]["model"] == "simple/cnn4"
    assert summary["teachers"]["wide"]["model"] == "simple/cnn8"
    assert 0 < summary["teachers"]["wide"]["top1"] <= 1
    assert set(summary["weights"]) == {"kd_teacher", "kd_wide"}
    assert "simple/cnn8 (" in (tmp_path / "a/run.html").read_text()
    assert {"kd_teacher.output.kd", "kd_wide.output.kd"} <= RunFolder("a").read_history()[0].keys()
    assert diffkd("evaluate", "a", **env)[0] == 0
    again = diffkd(*words, "output=b", "seed=1", "teachers.wide.share=1", "method=diffkd", **env)
    assert "training simple/cnn" not in again[1] + again[2]
    Image.effect_noise((8, 8), 80).save(tmp_path / "picture.png")
    status, out, err = diffkd("visualize", "b", "picture.png", **env)
    assert (status, err) == (0, "")
    assert out.endswith("\n1 picture: b/denoising/index.html\n")
    assert out.startswith("of several teachers the first is shown, and what was learned from it: simple/cnn4")
    first = json.loads((tmp_path / "b/summary.json").read_text())["teacher"]["weights"]
    alike = similarity(RunFolder("b"), first)
    assert any(pair["after"] is not None for pair in alike.values())
    status, out, err = diffkd("check", "digits-8x8", *SHORT, *WIDE, **env)
    assert status == 0, err
    assert "wide (frozen)" in out
    status, _, err = diffkd("visualize", "a", "nothing.png", **env)
    assert status == 2
    assert err.count("\n") == 1
