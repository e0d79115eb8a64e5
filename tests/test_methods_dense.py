"""Methods for segmentation and detection against the formulas of their papers."""

import pytest
import torch
from torch import nn

import oracle_dense as oracle
from diffkd import Batch, UserError
from diffkd.features.maps import class_labels, label_maps
from diffkd.methods.base import Feature, Pair, Setup, method_class

CLASSES, SIZE = 4, (4, 6)
SAME, OTHER = ((5, *SIZE), (5, *SIZE)), ((5, *SIZE), (7, *SIZE))


def build(name, shapes=OTHER, *, logits=False, classes=CLASSES, **options):
    torch.manual_seed(0)
    pair = Pair("map", *(Feature("", shape) for shape in shapes), is_logits=logits)
    setup = Setup((pair,), nn.Identity(), nn.Identity(), num_classes=classes, dataset_size=9)
    return method_class(name)(setup, **options).double()


def draw(shapes=OTHER, batch=3):
    """Features of both sides, a batch with void corners and void labels."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.randn(batch, *s, generator=generator, dtype=torch.float64) for s in shapes)
    valid = torch.ones(batch, *SIZE, dtype=torch.bool)
    valid[0, :, 4:] = False
    valid[1, :1] = False
    labels = torch.randint(0, CLASSES, (batch, *SIZE), generator=generator)
    labels[2, 2] = 255
    return ours.requires_grad_(), theirs, Batch(torch.zeros(batch, 3, *SIZE), labels, None, valid)


def assert_same(found, expected, student):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    ours, theirs = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (found, expected))
    assert theirs.any()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("temperature", [4.0, 0.7])
def test_cwd(temperature):
    ours, theirs, batch = draw(SAME)
    found = build("cwd", SAME, logits=True, temperature=temperature)({"map": ours}, {"map": theirs}, batch)
    assert_same(found["map.kd"], oracle.cwd(ours, theirs, batch.valid, temperature), ours)
    ours, theirs, batch = draw(OTHER)
    method = build("cwd", OTHER, temperature=temperature)
    aligned = oracle.linear(method.state_dict(), "regressors.map", ours)
    expected = 50 / 3 * oracle.cwd(aligned, theirs, batch.valid, temperature)
    assert_same(method({"map": ours}, {"map": theirs}, batch)["map.kd"], expected, ours)


def test_pkd():
    ours, theirs, batch = draw(SAME)
    found = build("pkd", SAME)({"map": ours}, {"map": theirs}, batch)["map.kd"]
    assert_same(found, oracle.pkd(ours, theirs, batch.valid), ours)
    scaled = build("pkd", SAME)({"map": ours}, {"map": 3 * ours.detach() - 2}, batch)["map.kd"]
    assert scaled < 1e-9


def test_ifvd():
    ours, theirs, batch = draw()
    found = build("ifvd")({"map": ours}, {"map": theirs}, batch)["map.kd"]
    assert_same(found, oracle.ifvd(ours, theirs, batch.targets, batch.valid), ours)


@pytest.mark.parametrize("grid", [2, 3])
def test_skd(grid):
    ours, theirs, batch = draw()
    found = build("skd", grid=grid)({"map": ours}, {"map": theirs}, batch)["map.kd"]
    assert_same(found, oracle.skd(ours, theirs, batch.valid, grid), ours)


def test_label_maps_of_another_size_and_frame():
    fine = torch.arange(4).repeat_interleave(2).repeat(4, 1)[None]  # 4 x 8: classes 0 to 3
    fine[0, :2, :2] = 255
    feature = torch.zeros(1, 6, 2, 4)
    labels, known = label_maps(Batch(torch.zeros(1, 3, 4, 8), fine), feature, 4)
    assert labels[0, 1].tolist() == [0, 1, 2, 3]
    assert known[0].tolist() == [[False, True, True, True], [True] * 4]
    # The picture was padded from 4 x 8 to 8 x 12; its label map was not.
    valid = torch.zeros(1, 8, 12, dtype=torch.bool)
    valid[:, :4, :8] = True
    for targets in (fine, [fine[0]]):
        batch = Batch(torch.zeros(1, 3, 4, 8), targets, None, valid)
        labels, known = class_labels(batch, torch.zeros(1, 4, 4, 6))
        assert labels[0, 1, :4].tolist() == [0, 1, 2, 3]
        assert known[0].sum() == 7


LABELLED = pytest.mark.parametrize("name", ["ifvd"])


@LABELLED
def test_what_label_methods_need(name):
    ours, theirs, batch = draw()
    with pytest.raises(UserError, match="num_classes"):
        build(name, classes=None)
    with pytest.raises(UserError, match="label maps"):
        build(name)({"map": ours}, {"map": theirs}, batch._replace(targets=None))
    with pytest.raises(UserError, match="class label"):
        build(name)({"map": ours}, {"map": theirs}, batch._replace(targets=torch.zeros(3)))


@pytest.mark.parametrize("name", ["cwd", "ifvd", "skd"])
def test_methods_that_need_maps(name):
    with pytest.raises(UserError, match="serves maps"):
        build(name, ((5,), (5,)))
