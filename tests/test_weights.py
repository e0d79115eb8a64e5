"""Weights of every origin: what matched is said, what does not fit or could run code is refused."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffkd.errors import UserError
from diffkd.models.weights import is_local, load_weights


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
