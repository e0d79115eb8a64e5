"""Recipes: strict, short where a name is enough, and the same after they are written and read again."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import TINY
from diffkd.errors import UserError
from diffkd.recipe.files import RECIPES, builtin
from diffkd.recipe.schema import check_options, dump, load
from diffkd.runs.identity import difference, identify, short_name


def key(recipe):
    return short_name(identify(recipe, {}))


def recipe(tmp_path, text, *overrides):
    place = tmp_path / "r.yaml"
    place.write_text(text)
    return load(str(place), overrides)


@pytest.mark.parametrize("name", builtin())
def test_every_recipe_is_short_valid_and_round_trips(name, tmp_path):
    assert len(builtin()[name].read_text().splitlines()) <= 15
    found = load(name)
    (tmp_path / "again.yaml").write_text(dump(found))
    again = load(str(tmp_path / "again.yaml"))
    assert again.model_dump(exclude={"name"}) == found.model_dump(exclude={"name"})
    assert key(again) == key(found)


def test_all_files_of_recipes_are_short():
    assert all(len(p.read_text().splitlines()) <= 15 for p in RECIPES.rglob("*.yaml"))


def test_short_forms_mean_the_long_ones(tmp_path):
    short = recipe(
        tmp_path,
        "data: digits\nstudent: simple/cnn4\nteacher: simple/cnn8\n"
        "method: diffkd\noptimizer: adamw\nschedule: constant",
    )
    long = recipe(
        tmp_path,
        "data: {name: digits}\nstudent: {model: simple/cnn4}\nteacher: {model: simple/cnn8}\n"
        "method: {diffkd: {}}\noptimizer: {name: adamw}\nschedule: {name: constant}",
    )
    assert short == long


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("diffkd", {"diffkd": None}),
        ("{diffkd: 1.0, kd: 0.5}", {"diffkd": 1.0, "kd": 0.5}),
        ("{diffkd: {weight: 2, num_steps: 3}}", {"diffkd": 2.0}),
        ("diffkd,kd", {"diffkd": None, "kd": None}),
        ("diffkd + kd", {"diffkd": None, "kd": None}),
        ("none", {}),
        ("null", {}),
    ],
)
def test_methods_and_weights(tmp_path, text, expected):
    found = recipe(tmp_path, f"data: digits\nstudent: simple/cnn4\nmethod: {text}")
    assert {name: m.weight for name, m in found.method.items()} == expected


def test_overrides_merge_in_order(tmp_path):
    found = recipe(
        tmp_path, TINY, "method.diffkd.num_steps=3", "trainer.epochs=5", "seed=1", "output=runs/a", "seed=2"
    )
    assert found.method["diffkd"].options == {"num_steps": 3}
    assert (found.trainer.epochs, found.seed, found.output) == (5, 2, "runs/a")
    assert found.trainer.log_every == 1


def test_a_new_name_drops_the_old_ones_keys(tmp_path):
    found = recipe(
        tmp_path, TINY, "optimizer=adamw", "schedule={name: step, milestones: [1]}", "teacher=simple/cnn16"
    )
    assert found.optimizer.lr == 0.02
    assert found.schedule.milestones == [1]
    assert recipe(tmp_path, TINY, "method=kd").method.keys() == {"kd"}


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    assert recipe(tmp_path, TINY, "optimizer.lr=1e-3").optimizer.lr == 1e-3
    assert recipe(tmp_path, TINY.replace("5.0e-4", "5e-4")).optimizer.weight_decay == 5e-4


def test_base_is_built_on(tmp_path):
    (tmp_path / "low.yaml").write_text(TINY)
    found = recipe(tmp_path, "base: low\nmethod: {kd: 0.5}\ntrainer: {epochs: 7}\nseed: 3")
    assert found.method.keys() == {"kd"}
    assert (found.trainer.epochs, found.trainer.log_every, found.seed) == (7, 1, 3)
    assert recipe(tmp_path, "base: digits-8x8\nseed: 4").data.name == "digits"


def test_base_that_comes_back_is_refused(tmp_path):
    with pytest.raises(UserError, match="comes back to itself"):
        recipe(tmp_path, "base: r.yaml")


def test_teacher_recipe_and_its_key(tmp_path):
    made = "teacher.train={epochs: 3, optimizer: {lr: 0.1}}"
    one = recipe(tmp_path, TINY, made)
    teacher = one.teacher_recipe()
    assert (teacher.student.model, teacher.trainer.epochs, teacher.optimizer.lr) == ("simple/cnn8", 3, 0.1)
    assert teacher.teacher is None
    assert teacher.method == {}
    same = recipe(
        tmp_path, TINY, made, "seed=5", "output=x", "data.workers=0", "method=kd", "student=simple/cnn2"
    )
    assert key(same.teacher_recipe()) == key(teacher)
    other = recipe(tmp_path, TINY, made, "data.batch_size=100")
    assert key(other.teacher_recipe()) != key(teacher)


def test_difference_names_the_key(tmp_path):
    one = recipe(tmp_path, TINY)
    assert difference(one, recipe(tmp_path, TINY, "output=b", "trainer.log_every=7")) is None
    assert (
        difference(one, recipe(tmp_path, TINY, "optimizer.lr=0.5"))
        == "optimizer.lr is 0.02 there and 0.5 here"
    )


MISTAKES = {
    "trainer.epoch=3": ("trainer.epoch", "'epochs'"),
    "trainer.epochs=ten": ("trainer.epochs", "a whole number, got 'ten'"),
    "trainer.epochs=1.5": ("trainer.epochs", "a whole number"),
    "trainer.epochs=-1": ("trainer.epochs", "at least 1, got -1"),
    "trainer.compile=1": ("trainer.compile", "true or false"),
    "trainer.precision=fp8": ("trainer.precision", "fp16"),
    "trainer.devices=0": ("trainer.devices", "needs at least 1, or 'auto', got 0"),
    "trainer.devices=all": ("trainer.devices", "needs a whole number, or 'auto', got 'all'"),
    "data.class_weights=even": ("data.class_weights", "needs a list, or 'balanced', got 'even'"),
    "trainer.ema=1.5": ("trainer.ema", "less than 1"),
    "optimizer.lrr=1": ("optimizer.lrr", "'lr'"),
    "optimizer.lr=0": ("optimizer.lr", "more than 0"),
    "optimizer=adam": ("optimizer", "'adamw'"),
    "optimizer={name: adamw, betas: [1]}": ("optimizer.betas", "a list"),
    "schedule={name: step}": ("schedule", "needs either milestones"),
    "schedule={name: step, every: 2, milestones: [1]}": ("schedule", "needs either milestones"),
    "schedule={name: cosine, milestones: [1]}": ("schedule.milestones", "unknown key"),
    "student=3": ("student", "mapping"),
    "student.modle=x": ("student.modle", "'model'"),
    "teacher.train.epoch=1": ("teacher.train.epoch", "'epochs'"),
    "data.batch_size=0": ("data.batch_size", "at least 1"),
    "data.workers=-1": ("data.workers", "at least 0"),
    "method.diffkd.weight=-1": ("method.diffkd.weight", "at least 0"),
    "method=[3": ("method", "cannot be read"),
    "sed=1": ("sed", "'seed'"),
    "seed=-1": ("seed", "at least 0"),
    "seed": ("seed", "not key=value"),
    "base=digits": ("base", "in a file"),
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_names_its_key_in_one_line(tmp_path, override):
    key, words = MISTAKES[override]
    with pytest.raises(UserError) as caught:
        recipe(tmp_path, TINY, override)
    line = str(caught.value)
    assert "\n" not in line
    assert key in line
    assert words in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.diffkd.numsteps=3", "method.diffkd.numsteps: unknown key; did you mean 'num_steps'"),
        ("method.diffkd.num_steps=three", "method.diffkd.num_steps: needs a whole number, got 'three'"),
        ("method=diffdk", "unknown method 'diffdk'; did you mean 'diffkd' or 'ifvd'?"),
        ("data.batchsize=3", "data.batchsize: unknown key; did you mean 'batch_size'"),
        ("data=digit", "unknown data set 'digit'; did you mean 'digits'?"),
        ("task.label_smothing=0.1", "task.label_smothing: unknown key; did you mean 'label_smoothing'?"),
        ("task=clasification", "did you mean 'classification'?"),
    ],
)
def test_options_are_checked_against_what_takes_them(tmp_path, override, words):
    with pytest.raises(UserError) as caught:
        check_options(recipe(tmp_path, TINY, override))
    assert words in str(caught.value)


def test_whole_numbers_do_where_numbers_are_asked(tmp_path):
    check_options(recipe(tmp_path, TINY, "method.diffkd.temperature=2", "task.label_smoothing=0"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("data: {name: digits", "line"),
        ("- a\n- b", "a mapping of keys, this is a list"),
        ("", "a mapping of keys, this is nothing"),
        ("data: digits", "student: is needed"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, words):
    with pytest.raises(UserError) as caught:
        recipe(tmp_path, content)
    assert words in str(caught.value)
    assert "r.yaml" in str(caught.value)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"r\.yaml"):
        load(str(tmp_path / "r.yaml"))


def test_unknown_recipe_gives_the_nearest():
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load("digts")
    with pytest.raises(UserError, match=r"no recipe file 'gone\.yaml'"):
        load("gone.yaml")


def test_reading_a_recipe_does_not_import_torch():
    code = (
        "import sys; from diffkd.recipe.schema import load; load('digits'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dump_is_plain_yaml(tmp_path):
    content = yaml.safe_load(dump(recipe(tmp_path, TINY)))
    assert content["student"]["model"] == "simple/cnn4"
    assert "output" not in content


def test_whole_sections_come_before_what_is_in_them():
    words = ["data.root=here", "teacher.mean=[0.5]", "method.kd.temperature=2", "data=table", "method=kd"]
    found = load("digits", [*words, "teacher.model=simple/cnn8"])
    assert (found.data.name, Path(found.data.root), found.teacher.mean) == (
        "table",
        Path.cwd() / "here",
        [0.5],
    )
    assert found.method["kd"].options == {"temperature": 2}


@pytest.mark.parametrize(
    "text", ["2024", "no", "pets: new", "pets #2", "2024-11-25", "~pets", "0x_", "[a", "a b", "1e3"]
)
def test_words_of_text_are_the_text(text):
    found = load("folder", [f"data.root={text}", f"output={text}", f"teacher.weights={text}"])
    assert Path(found.data.root) == Path.cwd() / text
    assert (found.output, found.teacher.weights) == (text, text)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lr=1", "optimizer.lr"),
        ("epochs=3", "trainer.epochs"),
        ("batch_size=3", "data.batch_size"),
        ("ema=0.9", "trainer.ema"),
        ("device=cuda", "trainer.accelerator"),
        ("root=here", "data.root"),
        ("momentum=0.9", "optimizer.momentum"),
        ("size=32", "teacher.size"),
    ],
)
def test_a_key_at_the_wrong_place_leads_to_the_right_one(word, meant):
    with pytest.raises(UserError) as caught:
        load("digits", [word])
    key = word.partition("=")[0]
    assert (
        str(caught.value)
        == f"recipe 'digits' with the command line: {key}: unknown key; did you mean '{meant}'?"
    )


def test_all_known_keys_are_listed():
    with pytest.raises(UserError, match=r"known: accelerator, .*, threads") as caught:
        load("digits", ["trainer.zzzzzzzz=1"])
    assert "..." not in str(caught.value)


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "seed: 0x_",
        "seed: !!bool maybe",
        "a: " + "[" * 500 + "]" * 500,
        "? {a: 1}\n: 2",
        "a: !!python/name:os.system",
        "a: &a [*a]",
        'output: "a\\0b"',
    ],
)
def test_odd_yaml_is_one_line(tmp_path, text):
    with pytest.raises(UserError) as caught:
        recipe(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_options_of_a_method_of_ones_own_and_of_one_that_is_not_used(tmp_path):
    words = ["method=my_losses:MyLoss", "method.my_losses:MyLoss.power=1.5"]
    assert recipe(tmp_path, TINY, *words).method["my_losses:MyLoss"].options == {"power": 1.5}
    words = ["method=a/b.py:My", "method.a/b.py:My.power=1.5"]
    assert recipe(tmp_path, TINY, *words).method["a/b.py:My"].options == {"power": 1.5}
    with pytest.raises(UserError, match="'diffkd' is not among the methods \\(kd\\); say method=kd,diffkd"):
        recipe(tmp_path, TINY, "method=kd", "method.diffkd.num_steps=2")


def test_published_figures_stay_only_where_models_and_training_do():
    name = "imagenet/resnet34-resnet18"
    assert load(name, ["seed=1", "method=dist"]).published["diffkd"] == 72.22
    assert load(name, ["trainer.epochs=5"]).published == {}
    assert "published" not in dump(load(name))
