"""What holds for every method, with every kind of feature and every family of models."""

import pytest
import torch
from torch import nn

from diffkd import Batch, Distiller, UserError
from diffkd.methods.base import method_class
from diffkd.models import cifar, simple
from diffkd.names import submodules

# Methods for dense models alone are tested in test_methods_dense.py, and with masks like all others.
DENSE = {"cwd", "ifvd", "skd", "cirkd", "fgd", "afdcd", "ld", "crosskd", "maskd"}
METHODS = [name for name in submodules("diffkd.methods") if name not in {"none", *DENSE}]
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BATCH = Batch(IMAGES, torch.tensor([0, 1, 2, 3]), torch.arange(4))
CLASSES, SAMPLES = 5, 20
# Published weights beside the labels' loss.
PAPERS = {"kd": 0.9, "dkd": 1, "dist": 1, "mlkd": 0.9, "ofa": 1, "diffkd": 1, "fitnet": 100, "at": 1000}
PAPERS |= {"sp": 3000, "rkd": 1, "pkt": 30000, "vid": 1, "crd": 0.8, "ofd": 1, "reviewkd": 5, "simkd": 1}


class Tokens(nn.Module):
    """A transformer with a class token."""

    def __init__(self, width):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], 1))[:, 0])


class Shaped(nn.Module):
    """A network whose `body` gives vectors, sequences or volumes."""

    def __init__(self, width, dims):
        super().__init__()
        conv = {0: nn.Linear, 1: nn.Conv1d, 3: nn.Conv3d}[dims]
        size = {0: (), 1: (8,), 3: (2, 2, 2)}[dims]
        self.shape = (IMAGES[0].numel() // torch.Size(size).numel(), *size)
        self.body = conv(self.shape[0], width, *(() if dims == 0 else (1,)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        body = self.body(x.reshape(len(x), *self.shape)).relu()
        return self.head(body.flatten(2).mean(2) if body.dim() > 2 else body)


def cnn(width):
    return simple.build(f"cnn{width}", num_classes=CLASSES)


# family: student, teacher, taps (None: what the method wants by itself)
FAMILIES = {
    "cnn": (lambda: cnn(4), lambda: cnn(8), None),
    "other cnn": (
        lambda: cifar.build("shufflenetv2", num_classes=CLASSES),
        lambda: cifar.build("resnet8", num_classes=CLASSES),
        None,
    ),
    "tokens from cnn": (lambda: Tokens(8), lambda: cnn(8), None),
    "cnn from tokens": (lambda: cnn(4), lambda: Tokens(16), None),
    "tokens": (lambda: Tokens(8), lambda: Tokens(16), None),
    "vectors": (lambda: Shaped(4, 0), lambda: Shaped(8, 0), {"body": "body", "": ""}),
    "sequences": (lambda: Shaped(4, 1), lambda: Shaped(8, 1), {"body@BCL": "body@BCL", "": ""}),
    "volumes": (lambda: Shaped(4, 3), lambda: Shaped(8, 3), {"body@BCDHW": "body@BCDHW", "": ""}),
}
# Methods that cannot serve a kind of feature, and the reason that they give.
REFUSED = {
    ("at", "vectors"): "no positions",
    ("mgd", "vectors"): "no positions",
    ("reviewkd", "vectors"): "maps",
    ("reviewkd", "sequences"): "maps",
    ("reviewkd", "volumes"): "maps",
}


def build(method, family):
    torch.manual_seed(0)
    student, teacher, taps = FAMILIES[family]
    return Distiller(
        student(), teacher(), taps, method, IMAGES, num_classes=CLASSES, dataset_size=SAMPLES
    ).train()


@pytest.mark.filterwarnings("ignore:.*resized to the smaller")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_losses_gradients_and_state(method, family):
    if (method, family) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[method, family]):
            build(method, family)
        return
    distiller = build(method, family)
    losses = distiller(BATCH)
    assert losses
    assert all(value.dim() == 0 and bool(value.isfinite()) for value in losses.values())
    losses.total.backward()
    grads = [p.grad for p in distiller.student.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in grads) > 0
    assert all(bool(g.isfinite().all()) for g in grads)
    assert all(p.grad is None and not p.requires_grad for p in distiller.teacher.parameters())
    learned = [p for p in distiller.methods.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learned)
    again = build(method, family)
    again.load_state_dict(distiller.state_dict())
    for ours, theirs in zip(distiller.eval()(BATCH), again.eval()(BATCH), strict=True):
        assert ours == theirs
    torch.manual_seed(1)
    first = distiller(BATCH).total
    torch.manual_seed(1)
    torch.testing.assert_close(again(BATCH).total, first)


@pytest.mark.parametrize("method", METHODS)
def test_one_sample_and_half_precision(method):
    distiller = build(method, "cnn")
    one = Batch(*(value[:1] for value in BATCH[:3]))
    assert bool(distiller(one).total.isfinite())
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(distiller(BATCH).total.isfinite())


def test_methods_add_up_by_weight():
    torch.manual_seed(0)
    distiller = Distiller(cnn(4), cnn(8), None, {"kd": 0.5, "sp": {"weight": 3.0}}, IMAGES)
    losses = distiller(BATCH)
    parts = {
        name: Distiller(distiller.student, distiller.teacher, None, {name: 1.0}, IMAGES)
        for name in ("kd", "sp")
    }
    assert losses["kd.output.kd"] == 0.5 * parts["kd"](BATCH)["kd.output.kd"]
    assert losses["sp.stage3.kd"] == 3.0 * parts["sp"](BATCH)["sp.stage3.kd"]


def test_a_name_alone_has_its_papers_weight():
    weights = {name: method_class(name).weight for name in METHODS}
    assert weights | PAPERS == weights
    for methods in ("sp", {"sp": {}}, {"sp": None}):
        given = Distiller(cnn(4), cnn(8), None, methods, IMAGES)
        assert given.weights == {"sp": 3000.0}
