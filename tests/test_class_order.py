"""The order of classes: as weights know it, from whatever describes them."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

from diffkd.data.base import Loader
from diffkd.errors import UserError
from diffkd.models.base import build
from diffkd.models.weights import load_weights, read_weights, told_classes
from diffkd.pictures.held import classes_in
from diffkd.pictures.memory import ArraySplit
from diffkd.recipe.classes import build_data
from diffkd.recipe.schema import load
from mask_cases import street
from picture_cases import paint

NATURAL = ["c2", "c9", "c10"]
TOLD = {
    "config.json": {"image_shape": [3, 8, 8], "class_names": NATURAL},
    "timm's": {"architecture": "x", "pretrained_cfg": {"label_names": NATURAL}},
    "transformers'": {"id2label": dict(enumerate(NATURAL))},
    "metadata": None,
}


@pytest.fixture
def numbered(tmp_path, tiny):
    for name in NATURAL:
        for i in range(4):
            paint(tmp_path / "pictures" / name / f"{i}.png")
    words = ["data.name=folder", f"data.root={tmp_path / 'pictures'}", "data.image_size=8", "method=kd"]
    return lambda *more: build_data(load(str(tiny), [*words, *more]))


def weights(tmp_path, kind):
    place = tmp_path / "weights" / "model.safetensors"
    place.parent.mkdir()
    metadata = {"class_names": json.dumps(NATURAL)} if TOLD[kind] is None else None
    save_file({"x": torch.zeros(1)}, place, metadata=metadata)
    if TOLD[kind] is not None:
        place.with_name("config.json").write_text(json.dumps(TOLD[kind]))
    return place


@pytest.mark.parametrize("kind", TOLD)
def test_classes_stand_as_the_weights_know_them(numbered, tmp_path, kind):
    assert numbered()[1].class_names == ("c10", "c2", "c9")
    place = weights(tmp_path, kind)
    recipe, data = numbered(f"teacher.weights={place}")
    assert list(data.class_names) == NATURAL
    assert recipe.teacher_recipe().data.class_order == NATURAL
    note = "classes are in the order in which teacher.weights know them: 'c2' is class 0, not 'c10'"
    assert note in data.notes
    assert list(numbered(f"student.weights={place}")[1].class_names) == NATURAL


@pytest.mark.parametrize(
    "said",
    [
        {"class_to_idx": {name: i for i, name in enumerate(NATURAL)}},
        {"idx_to_class": dict(enumerate(NATURAL))},
        {"meta": {"dataset_meta": {"CLASSES": tuple(NATURAL)}, "epoch": 3}},
        {"args": argparse.Namespace(names=NATURAL)},
    ],
)
def test_checkpoints_say_their_classes(tmp_path, said):
    torch.save({"state_dict": {"x": torch.zeros(1)}, **said}, tmp_path / "a.pth")
    assert told_classes(tmp_path / "a.pth") == tuple(NATURAL)
    for odd in ({"classes": 10}, {"class_to_idx": {"a": 1, "b": 3}}, {"names": [1, 2]}):
        torch.save({"state_dict": {"x": torch.zeros(1)}, **odd}, tmp_path / "a.pth")
        assert told_classes(tmp_path / "a.pth") == ()


def test_an_order_of_ones_own_that_the_weights_do_not_know_is_refused_where_it_matters(numbered, tmp_path):
    words = [f"teacher.weights={weights(tmp_path, 'metadata')}", "data.class_order=name"]
    with pytest.raises(UserError, match=r"teacher.weights know the classes in another order: 'c2'"):
        numbered(*words)
    _, data = numbered(*words, "teacher.train.epochs=1")
    assert data.class_names == ("c10", "c2", "c9")
    assert any("teacher.weights knew the classes in another order" in note for note in data.notes)


@pytest.mark.parametrize("kept", [False, True], ids=["read one by one", "in memory"])
def test_other_sets_than_folders_are_renumbered_with_their_labels(numbered, tmp_path, kept):
    rows = [f"{name}/{i}.png,{name}" for name in NATURAL for i in range(4)]
    (tmp_path / "pictures" / "train.csv").write_text("\n".join(["path,label", *rows]))
    words = ["data.name=table", "data.val_fraction=0.5"] + ["data.image_size=null"] * kept
    place = weights(tmp_path, "metadata")
    plain, (recipe, data) = numbered(*words)[1], numbered(*words, f"teacher.weights={place}")
    assert (plain.class_names, data.class_names) == (("c10", "c2", "c9"), tuple(NATURAL))
    for before, after in ((plain.train, data.train), (plain.test, data.test)):
        assert isinstance(after, ArraySplit) == kept
        new = [NATURAL.index(plain.class_names[label]) for label in classes_in(before).tolist()]
        assert classes_in(after).tolist() == new
        seen = next(Loader(after, len(new), shuffle=False).epoch()).targets
        assert seen.tolist() == new
    assert numbered(*words, "data.class_order=natural")[1].class_names == tuple(NATURAL)
    assert recipe.data.class_order == NATURAL
    with pytest.raises(UserError, match="must name each class once; the classes: 'c10', 'c2', 'c9'"):
        numbered(*words, "data.class_order=[c2, c9]")


def test_weights_that_mean_nothing_are_named(tmp_path):
    model = build("simple/cnn4", num_classes=3, image_shape=(3, 8, 8))
    state = model.state_dict()
    head = state["head.weight"]
    for name, value, words in (
        ("nan", head * float("nan"), "'head.weight' holds nan: the training that wrote it had failed"),
        ("whole", head.to(torch.int8), "does not fit simple/cnn4: 'head.weight' is int8"),
        ("complex", head.to(torch.complex64), "'head.weight' is complex64; save it as float32 or half"),
    ):
        torch.save({**state, "head.weight": value}, place := tmp_path / f"{name}.pth")
        with pytest.raises(UserError) as caught:
            load_weights(model, place, name="simple/cnn4")
        assert words in str(caught.value)
    torch.save({"a": {"b": state}, "c": {"d": state}}, tmp_path / "deep.pth")
    with pytest.raises(UserError, match=r"holds no weights \(it has: a, c\)"):
        read_weights(tmp_path / "deep.pth")


def test_sets_that_number_their_classes_themselves_say_why_they_have_no_other_order(tmp_path):
    recipe = load("masks", [f"data.root={street(tmp_path, count=2)}", "data.class_order=natural"])
    with pytest.raises(UserError, match=r"say the numbers themselves \(values of masks.*leave it out"):
        build_data(recipe)
