"""Checkpoints of other frameworks: wherever the tensors lie in them and whatever their names begin with."""

import collections
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffkd.errors import UserError
from diffkd.models.weights import load_backbone, load_state, load_weights, read_weights
from test_weights import net, same


def named(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def net_of(state, prefix):
    model = net()
    model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return model


def load(content, place, model=None, save=torch.save, **options):
    save(content, place)
    model = model or net()
    return model, load_weights(model, place, name="net", **options)


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda s: named("model.", s) | {"criterion.weight": torch.ones(5)}, "left out (criterion)"),
        (lambda s: named("net._orig_mod.", s) | {"acc.total": torch.ones(1)}, "left out (acc)"),
        (
            lambda s: named("backbone.", s) | {"decode_head.conv.weight": torch.ones(1)},
            "left out (decode_head)",
        ),
        (lambda s: named("_fsdp_wrapped_module.", s), "9 of 9"),
        (lambda s: {"checkpoint": {"model": {"state_dict": s}}, "log": {}}, "('checkpoint')"),
        (lambda s: {"network": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}, "('network')"),
        (lambda s: {"checkpoint": {"state_dict": s}, "log": collections.defaultdict(list)}, "('checkpoint')"),
        (lambda s: {"params_ema": s, "params": {k: v * 0 for k, v in s.items()}}, "'params_ema', averaged"),
        (lambda s: {k: v.numpy() for k, v in s.items()}, "9 of 9"),
        (lambda s: s | {"total_ops": torch.zeros(1), "0.total_params": torch.zeros(1)}, "9 of 9"),
    ],
)
def test_tensors_are_found_and_what_else_is_there_is_said(tmp_path, wrap, words):
    source = net()
    model, said = load(wrap(source.state_dict()), tmp_path / "a.pth")
    assert same(model, source)
    assert words in said.note


def test_plain_weights_go_into_a_model_that_wraps_theirs(tmp_path):
    source = net()
    wrapped = nn.ModuleDict({"body": nn.ModuleDict({"net": net()})})
    load(source.state_dict(), tmp_path / "a.pth", wrapped)
    assert same(wrapped["body"]["net"], source)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save(named("timm_model.", source.state_dict()), tmp_path / "a.pth")
    load_backbone(body, tmp_path / "a.pth", "body")
    assert torch.equal(body[0].weight, source[0].weight)


def test_two_models_in_one_file_are_not_chosen_between(tmp_path, monkeypatch):
    both = named("encoder_q.", net().state_dict()) | named("encoder_k.", net().state_dict())
    with pytest.raises(
        UserError, match=r"several models that fit, in 'encoder_q\.' and 'encoder_k\.'"
    ) as raised:
        load(both, tmp_path / "a.pth")
    monkeypatch.chdir(tmp_path)
    exec(str(raised.value).partition("meant: ")[2])  # the way out that the line says
    assert same(load(torch.load("one.pth"), tmp_path / "b.pth")[0], net_of(both, "encoder_q."))
    with pytest.raises(UserError, match=r"\(it has: student, teacher.*x\['student'\], 'one.pth'"):
        load({"student": net().state_dict(), "teacher": net().state_dict()}, tmp_path / "a.pth")


def test_a_body_without_a_classifier_leaves_the_head_fresh_and_says_so(tmp_path):
    source = net()
    body = {key: value for key, value in source.state_dict().items() if key[0] != "3"}
    model, said = load(body, tmp_path / "a.pth", num_classes=5)
    assert said.fresh_head
    assert "no head in it: a fresh one (3.weight, 3.bias) for 5 classes" in said.note
    assert same(model, source, but=("3.weight", "3.bias"))
    for wanted in ({"num_classes": 7}, {}):
        with pytest.raises(UserError, match="2 keys missing"):
            load(body, tmp_path / "a.pth", **wanted)
    del body["0.bias"]
    with pytest.raises(UserError, match="3 keys missing"):
        load(body, tmp_path / "a.pth", num_classes=5)


def test_a_head_of_another_name_is_not_left_out(tmp_path):
    source = net()
    renamed = {
        ("body." + k if k[0] != "3" else k.replace("3", "fc")): v for k, v in source.state_dict().items()
    }
    with pytest.raises(
        UserError, match=r"2 keys missing \(3\.weight, 3\.bias\).*weights_by_order=true takes"
    ):
        load(renamed, tmp_path / "a.pth", num_classes=5)
    model = net()
    tensors, said = read_weights(tmp_path / "a.pth")
    load_state(model, tensors, said, name="net", num_classes=5, by_order=True)
    assert same(model, source)


def test_8_bit_numbers_and_arrays_without_names_are_refused(tmp_path):
    eight = {k: v.to(torch.float8_e4m3fn) for k, v in net().state_dict().items()}
    with pytest.raises(UserError, match="is float8_e4m3fn; save it as float32 or half"):
        load(eight, tmp_path / "a.safetensors", save=save_file)
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(UserError, match="an array of NumPy, without names"):
        load_weights(net(), tmp_path / "a.npy", name="net")


def test_content_counts_not_the_ending(tmp_path):
    source = net()
    for name, save in (("a.pth", save_file), ("a.safetensors", torch.save)):
        assert same(load(source.state_dict(), tmp_path / name, save=save)[0], source)
    (tmp_path / "a.pth").unlink()
    (tmp_path / "a.safetensors").rename(tmp_path / "pytorch_model.bin")
    model = net()
    load_weights(model, tmp_path, name="net")
    assert same(model, source)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="weights in several files; save them as one"):
        load_weights(model, tmp_path, name="net")


def archive(*names):
    def write(place):
        with zipfile.ZipFile(place, "w") as file:
            for name in names:
                file.writestr(name, "")

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda p: p.write_bytes(b'{"message": "Not Found"}'), "text in JSON"),
        (lambda p: p.write_bytes(b"\x1f\x8b" + bytes(9)), "gunzip"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n" + bytes(9)), "HDF5"),
        (lambda p: p.write_bytes(b"\x08\x07\x12\x07pytorch"), "ONNX"),
        (lambda p: p.write_bytes(b"PK\3\4" + bytes(60)), "the archive has no end"),
        (archive("m/constants.pkl", "m/data.pkl"), "TorchScript"),
        (archive("a.npy"), "archive of NumPy"),
        (archive("m/readme.txt"), "without PyTorch's weights"),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path, write, words):
    write(tmp_path / "a.pth")
    with pytest.raises(UserError, match=words):
        load_weights(net(), tmp_path / "a.pth", name="net")


def test_infinite_weights_are_refused_but_for_masks_of_attention(tmp_path):
    state = net().state_dict()
    state["0.bias"] = torch.tensor([0.0, -np.inf, 0, 0])
    load(state, tmp_path / "a.pth")
    state["0.bias"] = torch.tensor([0.0, np.inf, 0, 0])
    with pytest.raises(UserError, match=r"'0\.bias' holds infinite values"):
        load(state, tmp_path / "a.pth")
