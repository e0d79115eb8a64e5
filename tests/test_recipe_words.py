"""Words and YAML as people write them: nothing is read as another number, and no key is taken twice."""

import pytest

from diffkd.errors import UserError
from diffkd.recipe.reading import parse
from diffkd.recipe.schema import load
from diffkd.recipe.words import parse_override

GOOD = "task: classification\ndata: {name: digits}\nstudent: {model: simple/cnn2}\n"


def error(tmp_path, text):
    place = tmp_path / "r.yaml"
    place.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load(str(place))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_numbers_are_those_that_people_mean():
    for text, value in {
        "010": "010",
        "1:30": "1:30",
        "1:30.5": "1:30.5",
        "1_000": 1000,
        "0x10": 16,
        "-3": -3,
        "0": 0,
        "0.0": 0.0,
        ".5": 0.5,
        "1.5e-3": 0.0015,
        "12e3": 12000.0,
        "1.2.3": "1.2.3",
        ".inf": float("inf"),
    }.items():
        assert (parse(text), type(parse(text))) == (value, type(value)), text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "seed: 1\nseed: 2\n", "the key 'seed' stands there twice"),
        (GOOD + "optimizer: {lr: 1, lr: 2}\n", "the key 'lr' stands there twice"),
        (GOOD + "seed: 1:30\n", "seed: needs a whole number, got '1:30'"),
        (GOOD + "seed: 010\n", "seed: needs a whole number, got '010'"),
        (GOOD + "1: 2\n", "keys are names, this is 1"),
        (GOOD.encode() + b"\0", "special characters are not allowed"),
        (GOOD + "base: [a]\n", "base: unknown recipe"),
    ],
)
def test_yaml_that_means_something_else_is_refused(tmp_path, text, words):
    assert words in error(tmp_path, text)


def test_several_methods_and_lists_need_no_brackets(tmp_path):
    assert list(load("digits", ["method=diffkd+kd"]).method) == ["diffkd", "kd"]
    assert list(load("digits", ["method=c++/my.py:Loss"]).method) == ["c++/my.py:Loss"]
    assert parse_override("data.classes=ground, no") == ("data.classes", ["ground", "no"])
    assert parse_override("student.freeze=layer1,layer2")[1] == ["layer1", "layer2"]
    (tmp_path / "a,b.txt").touch()
    assert parse_override(f"data.classes={tmp_path}/a,b.txt")[1] == f"{tmp_path}/a,b.txt"


def test_paths_of_layers_and_home_need_no_quotes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["taps.layer1.0=layer2.0", "optimizer.lr_factors.stage1.0=0.1", "method.diffkd.taps.stage3.1=0.5"]
    recipe = load("digits", [*words, "output=~/runs", "teacher.weights=~/a.pth", "data.class_weights=1,2.5"])
    assert recipe.taps == {"layer1.0": "layer2.0"}
    assert recipe.optimizer.lr_factors == {"stage1.0": 0.1}
    assert recipe.method["diffkd"].taps == {"stage3.1": 0.5}
    assert (recipe.output, recipe.teacher.weights) == (f"{tmp_path}/runs", f"{tmp_path}/a.pth")
    assert recipe.data.class_weights == [1, 2.5]


@pytest.mark.parametrize(
    "word", ["seed=" + "9" * 30, "seed=0x" + "f" * 6000, "trainer.epochs=9223372036854775807"]
)
def test_numbers_beyond_all_machines_are_refused(word):
    with pytest.raises(UserError, match=r"cannot be read|needs at most 2\.14748e\+09"):
        load("digits", [word])
    assert load("digits", [f"seed={2**64 - 1}"]).seed == 2**64 - 1


def test_words_of_other_places_lead_to_theirs():
    for word, key in (
        ("image_size", "data.image_size"),
        ("teacher_weights", "teacher.weights"),
        ("label_smoothing", "task.label_smoothing"),
    ):
        with pytest.raises(UserError, match=f"did you mean '{key}'"):
            load("digits", [f"{word}=1"])
    with pytest.raises(
        UserError, match=r"command line: student.options: '\{a: \{a: .*\.\.\.' cannot be read"
    ):
        load("digits", ["student.options=" + "{a: " * 400])


def test_a_distillation_s_words_serve_training_alone(diffkd, tmp_path):
    words = ["teacher.train.epochs=1", "teacher.weights=x", "method.kd.temperature=2", 'taps={"": ""}']
    status, _, err = diffkd("train", "folder", *words, "data.root=nowhere", "student=simple/cnn2")
    assert status == 2
    assert "nowhere' does not exist" in err
