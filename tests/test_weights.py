"""Weights of every origin: what matched is said, what does not fit or could run code is refused."""

import argparse
import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffkd.errors import UserError
from diffkd.models.weights import is_local, load_state, load_weights, read_weights


def net(classes=5, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(4 * width, classes)
    )


def same(one, other, but=()):
    ours, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(ours[k], theirs[k]) for k in ours if k not in but)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "epoch": 3},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"ema": {"module": {**s}}, "model": {k: torch.zeros_like(v) for k, v in s.items()}},
        lambda s: {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in s.items()}},
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    ],
)
def test_usual_checkpoints(tmp_path, wrap):
    source, model = net(), net()
    torch.save(wrap(source.state_dict()), tmp_path / "a.pth")
    said = load_weights(model, tmp_path / "a.pth", name="net")
    assert same(model, source, but="1.num_batches_tracked")
    assert said.note.startswith("a.pth")
    assert not said.fresh_head


def test_averaged_weights_are_preferred_and_said(tmp_path):
    source = net()
    torch.save({"state_dict": net().state_dict(), "state_dict_ema": source.state_dict()}, tmp_path / "a.pth")
    model = net()
    assert "averaged" in load_weights(model, tmp_path / "a.pth", name="net").note
    assert same(model, source)


def test_safetensors_and_run_folders(tmp_path):
    source, model = net(), net()
    (tmp_path / "student").mkdir()
    save_file(source.state_dict(), tmp_path / "student" / "model.safetensors")
    assert load_weights(model, tmp_path, name="net").note == "model.safetensors: 9 of 9 tensors"
    assert same(model, source)


def test_another_number_of_classes_leaves_the_head_fresh_and_says_so(tmp_path):
    source, model = net(9), net(5)
    before = model[3].weight.clone()
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    said = load_weights(model, tmp_path / "a.safetensors", name="net", num_classes=5)
    assert said.fresh_head
    assert "fresh head (3.bias, 3.weight) for 5 instead of 9 classes" in said.note.replace(
        "3.weight, 3.bias", "3.bias, 3.weight"
    )
    assert same(model, source, but=("3.weight", "3.bias"))
    assert torch.equal(model[3].weight, before)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (net(9).state_dict(), "2 keys of another shape"),
        (net(5, 8).state_dict(), "keys of another shape (0.weight, 0.bias, 1.weight, ...)"),
        ({"0.weight": torch.zeros(4, 3, 3, 3)}, "7 keys missing (0.bias, 1.weight, 1.bias, ...)"),
        (net().state_dict() | {"extra": torch.zeros(1)}, "1 keys unexpected (extra)"),
        ({"epoch": 3}, "holds no weights"),
    ],
)
def test_what_does_not_fit_is_counted_and_the_model_unchanged(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pth")
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(model, tmp_path / "a.pth", name="net")
    assert words in str(error.value)
    assert "a.pth" in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_code_never_runs(tmp_path, capsys):
    torch.save({"a": Evil()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="could run code"):
        load_weights(net(), tmp_path / "a.pth", name="net")
    assert "code ran" not in capsys.readouterr().out


def test_damaged_and_missing_files(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"12345678")
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(net(), tmp_path / "a.safetensors", name="net")
    with pytest.raises(UserError, match="no weights file"):
        load_weights(net(), tmp_path / "b.pth", name="net")


def test_names_of_published_weights_are_no_places(tmp_path):
    assert not is_local("IMAGENET1K_V1")
    assert not is_local("pretrained")
    assert is_local("weights.pth")
    assert is_local(str(tmp_path))


def test_files_as_training_scripts_write_them(tmp_path):
    source, model = net(), net()
    script = {
        "args": argparse.Namespace(lr=0.1, data=Path("photos"), betas=(0.9, 0.999)),
        "meta": {"time": datetime.datetime(2024, 1, 2, 3, 4), "zone": datetime.UTC},
        "best": np.float64(0.5),
        "step": np.int32(7),
        "curve": np.arange(3.0),
        "state_dict": source.state_dict(),
    }
    torch.save(script, tmp_path / "a.pth")
    load_weights(model, tmp_path / "a.pth", name="net")
    assert same(model, source)


class Config:
    pass


def test_a_type_that_is_not_harmless_is_named_with_the_way_out(tmp_path):
    torch.save({"config": Config(), "state_dict": net().state_dict()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"test_weights\.Config, which could run code.*save_file"):
        load_weights(net(), tmp_path / "a.pth", name="net")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>Not Found</html>", "an HTML page"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_what_is_no_weights_is_called_what_it_is(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_weights(net(), tmp_path / name, name="net")


def test_no_tensors_and_odd_tensors(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="holds no weights"):
        load_weights(net(), tmp_path / "a.safetensors", name="net")
    torch.save({"0.weight": torch.zeros(2, 2).to_sparse()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"'0\.weight' is no plain tensor"):
        load_weights(net(), tmp_path / "a.pth", name="net")
    torch.save({0: torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="keys missing"):
        load_weights(net(), tmp_path / "a.pth", name="net")


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.model.module.", "module.module.net.", "model._orig_mod.module.model."]
)
def test_prefixes_in_any_depth_and_order(prefix, tmp_path):
    source, model = net(), net()
    torch.save({prefix + k: v for k, v in source.state_dict().items()}, tmp_path / "a.pth")
    load_weights(model, tmp_path / "a.pth", name="net")
    assert same(model, source)


def test_auxiliary_heads_are_left_out_and_said(tmp_path):
    source, model = net(), net()
    extra = {"aux1.fc.weight": torch.zeros(2), "AuxLogits.bias": torch.zeros(2)}
    extra["roi_heads.mask_head.0.weight"] = torch.zeros(2)
    torch.save({**source.state_dict(), **extra}, tmp_path / "a.pth")
    assert load_weights(model, tmp_path / "a.pth", name="net").note.endswith(
        "auxiliary heads left out (AuxLogits, aux1, roi_heads.mask_head)"
    )
    assert same(model, source)


def test_a_checkpoint_of_a_run(tmp_path):
    source, model = net(), net()
    state = {f"distiller.student.{k}": v for k, v in source.state_dict().items()}
    state["distiller.methods.kd.x"] = torch.zeros(2)
    torch.save({"model": state, "optimizer": {}, "ema": None, "place": {"step": 3}}, tmp_path / "step-3.pt")
    load_weights(model, tmp_path / "step-3.pt", name="net")
    assert same(model, source)


def test_other_names_in_the_same_order(tmp_path):
    source, model = net(), net()
    renamed = {f"layer{i}": v for i, v in enumerate(source.state_dict().values())}
    renamed = {k if v.dim() else f"{k}.num_batches_tracked": v for k, v in renamed.items()}
    torch.save(renamed, tmp_path / "a.pth")
    with pytest.raises(UserError, match="order and shapes agree: weights_by_order=true takes them so"):
        load_weights(model, tmp_path / "a.pth", name="net")
    tensors, said = read_weights(tmp_path / "a.pth")
    assert load_state(model, tensors, said, name="net", by_order=True).note.endswith("taken by their order")
    assert same(model, source, but="1.num_batches_tracked")
