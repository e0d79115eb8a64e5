"""Methods for segmentation and detection against the formulas of their papers."""

import pytest
import torch
from torch import nn
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead

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


@pytest.mark.parametrize("pooling", [1, 2])
def test_cirkd(pooling):
    ours, theirs, batch = draw()
    options = {"temperature": 0.5, "pooling": pooling, "pixel_weight": 2.0, "region_weight": 0.3, "memory": 3}
    method = build("cirkd", **options)
    sized = [oracle.pool(x, batch.valid, pooling) for x in (ours, theirs)]
    pixel = 2.0 * oracle.cirkd_pixel(sized[0][0], sized[1][0], sized[0][1], 0.5)
    assert_same(method({"map": ours}, {"map": theirs}, batch)["map.pixel"], pixel, ours)
    remembered = {k: [] for k in range(CLASSES)}
    method = build("cirkd", **options)
    for step in range(5):  # the memory holds three regions of each class
        theirs = torch.roll(theirs, step, 1)
        seen = oracle.regions(theirs, batch.targets, batch.valid, CLASSES)
        candidates = [r for rows in (seen, remembered) for k in range(CLASSES) for r in rows[k][-3:]]
        aligned = oracle.linear(method.state_dict(), "regressors.map", ours)
        expected = oracle.cirkd_region(aligned, theirs, batch.targets, batch.valid, candidates, 0.5)
        found = method({"map": ours}, {"map": theirs}, batch)["map.region"]
        assert_same(found, 0.3 * expected, ours)
        for k, rows in seen.items():
            remembered[k] += [oracle.mean(rows)] if rows else []


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_fgd(temperature):
    ours, theirs, batch = draw(SAME)
    # pixels are half positions; the second picture has no box
    boxes = [
        torch.tensor([[0.0, 1.0, 5.0, 6.0], [1.0, 1.0, 3.0, 2.0]]),
        torch.zeros(0, 4),
        torch.tensor([[4.0, 2.0, 11.0, 7.0]]),
    ]
    valid = batch.valid.repeat_interleave(2, 1).repeat_interleave(2, 2)
    batch = batch._replace(targets=[{"boxes": box} for box in boxes], valid=valid)
    method = build("fgd", SAME, temperature=temperature)
    with torch.no_grad():
        for weight in method.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    expected = oracle.fgd(
        method.state_dict(), ours, theirs, [box / 2 for box in boxes], draw(SAME)[2].valid, temperature
    )
    losses = method({"map": ours}, {"map": theirs}, batch)
    for name, weight in method.weights.items():
        assert_same(losses[f"map.{name}"], weight * expected[name], ours)
    with pytest.raises(UserError, match="dicts with boxes"):
        method({"map": ours}, {"map": theirs}, batch._replace(targets=torch.zeros(3)))


def test_afdcd():
    ours, theirs, batch = draw(((5, 4, 6), (6, 4, 6)))
    options = {"mask_ratio": 0.0, "patch": 2, "groups": 3, "spatial": 2.0, "channel": 3.0, "temperature": 0.7}
    method = build("afdcd", ((5, 4, 6), (6, 4, 6)), **options)
    # Without a mask this is the regression of two convolutions; zeros stand where nothing is valid.
    aligned = oracle.linear(method.state_dict(), "regressors.map", ours) * batch.valid[:, None]
    rebuilt = method.generation["map"](aligned.detach()).detach().requires_grad_()
    method.generation["map"] = nn.Identity()
    method.regressors["map"] = nn.Identity()
    losses = method({"map": rebuilt}, {"map": theirs}, batch)
    spatial, channel = oracle.afdcd(rebuilt, theirs, batch.valid, 2, 3, 0.7)
    assert_same(losses["map.spatial"], 2.0 * spatial, rebuilt)
    assert_same(losses["map.channel"], 3.0 * channel, rebuilt)
    error = oracle.mean(
        ((oracle.at(rebuilt, b, p) - oracle.at(theirs, b, p)) ** 2).mean()
        for b in range(3)
        for p in oracle.places(batch.valid, b)
    )
    assert_same(losses["map.reconstruction"], error, rebuilt)


def test_ld():
    ours, theirs, batch = draw(((12, *SIZE), (12, *SIZE)))
    method = build("ld", ((12, *SIZE), (12, *SIZE)), bins=3, temperature=2.0)
    found = method({"map": ours}, {"map": theirs}, batch)["map.kd"]
    assert_same(found, oracle.ld(ours, theirs, batch.valid, 3, 2.0), ours)
    with pytest.raises(UserError, match="the student gives 5 channels, not distributions"):
        build("ld", SAME)


def _dense(kind, channels, anchors):
    model = nn.Module()
    make = {"retinanet": RetinaNetHead, "fcos": FCOSHead}[kind]
    model.head = make(channels, anchors, CLASSES, **({"num_convs": 2} if kind == "fcos" else {})).double()
    for weight in model.parameters():  # answers far from each other
        nn.init.normal_(weight, 0, 0.3)
    return model


@pytest.mark.parametrize(("kind", "widths"), [("retinanet", (5, 7)), ("fcos", (32, 64))])
def test_crosskd(kind, widths):
    torch.manual_seed(0)
    student, teacher = _dense(kind, widths[0], 1), _dense(kind, widths[1], 2)
    shapes = {"map": SIZE, "low": (2, 3)}
    pairs = [Pair(n, *(Feature("", (w, *size)) for w in widths)) for n, size in shapes.items()]
    method = method_class("crosskd")(Setup(tuple(pairs), student, teacher), beta=1.5, box_weight=2.0).double()
    ours, theirs = ({n: torch.randn(2, w, *size).double() for n, size in shapes.items()} for w in widths)
    valid = torch.ones(2, *SIZE, dtype=torch.bool)
    valid[0, 2:] = False
    ours = {name: feature.requires_grad_() for name, feature in ours.items()}
    losses = method(ours, theirs, Batch(torch.zeros(2, 3, *SIZE), None, None, valid))
    expected = oracle.crosskd(kind, student, teacher, method.adapters, ours, theirs, valid, 1.5)
    assert_same(losses["classes"], expected["classes"], ours["map"])
    assert_same(losses["boxes"], 2.0 * expected["boxes"], ours["low"])
    assert list(method.state_dict()) == [f"adapters.{k}.{w}" for k in losses for w in ("weight", "bias")]
    # what gives the teacher's answers has nothing to learn
    again = method_class("crosskd")(Setup(tuple(map(_alike, pairs)), teacher, teacher)).double()
    same = again(theirs, theirs, Batch(torch.zeros(2, 3, *SIZE)))
    assert same["classes"] < 1e-3
    # but for boxes too small to say how far they overlap
    assert same["boxes"] < 0.05 * losses["boxes"]


def _alike(pair):
    return Pair(pair.name, pair.teacher, pair.teacher)


def test_crosskd_says_which_detectors_it_serves():
    setup = Setup((Pair("map", *(Feature("", s) for s in SAME)),), _dense("retinanet", 5, 1), nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"RetinaNet and FCOS have; the teacher \(Linear\) has none"):
        method_class("crosskd")(setup)
    setup = Setup(setup.pairs, setup.student, _dense("retinanet", 6, 1))
    with pytest.raises(UserError, match="the teacher gives 5 channels, its head takes 6"):
        method_class("crosskd")(setup)
    with pytest.raises(UserError, match="rest=5, but the teacher's head has 4 convolutions"):
        method_class("crosskd")(Setup(setup.pairs, setup.student, setup.student), rest=5)


LABELLED = pytest.mark.parametrize("name", ["ifvd", "cirkd"])


@LABELLED
def test_what_label_methods_need(name):
    ours, theirs, batch = draw()
    with pytest.raises(UserError, match="num_classes"):
        build(name, classes=None)
    with pytest.raises(UserError, match="label maps"):
        build(name)({"map": ours}, {"map": theirs}, batch._replace(targets=None))
    with pytest.raises(UserError, match="class label"):
        build(name)({"map": ours}, {"map": theirs}, batch._replace(targets=torch.zeros(3)))


@pytest.mark.parametrize("name", ["cwd", "ifvd", "skd", "cirkd", "fgd", "afdcd", "ld", "crosskd"])
def test_methods_that_need_maps(name):
    with pytest.raises(UserError, match="serves maps"):
        build(name, ((5,), (5,)))
