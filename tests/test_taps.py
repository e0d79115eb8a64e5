"""Features out of any module: layouts, entries, mistakes."""

import collections
import copy
import dataclasses

import pytest
import torch
from torch import nn

from diffkd.errors import UserError
from diffkd.features.taps import Taps
from diffkd.features.watch import dry_run


def probe(model, layers, images, size="images"):
    taps = Taps(model, layers)
    with dry_run(model):
        shapes = taps.probe(lambda: model(images), tuple(images.shape[2:]) if size == "images" else size)
    return taps, shapes


class Returns(nn.Module):
    """A layer whose output is whatever a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.inner = nn.Sequential()
        self.layer = function if isinstance(function, nn.Module) else _Function(function)

    def forward(self, x):
        self.layer(x)
        return x.mean((1, 2, 3))[:, None]


class _Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


IMAGES = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def tokens(count, width=6):
    return nn.Sequential(_Function(lambda x: x.new_ones(len(x), count, 2)), nn.Linear(2, width))


@pytest.mark.parametrize(
    ("function", "layer", "shape"),
    [
        (lambda x: x[..., ::2, ::2], "layer", (3, 8, 12)),
        (lambda x: x.permute(0, 2, 3, 1)[:, ::4, ::4], "layer", (3, 4, 6)),
        (lambda x: x.mean((2, 3)), "layer", (3,)),
        (tokens(24), "layer", (6, 4, 6)),
        (tokens(25), "layer", (6, 4, 6)),  # a class token
        (tokens(29), "layer", (6, 4, 6)),  # and four registers
        (lambda x: {"p3": x, "p4": x[..., ::2, ::2]}, "layer[p4]", (3, 8, 12)),
        (lambda x: (x, x[..., ::2, ::2]), "layer[1]", (3, 8, 12)),
        (lambda x: x.new_ones(len(x), 5, 7), "layer@BCL", (5, 7)),
        (lambda x: x.new_ones(len(x), 5, 7), "layer@BLC", (7, 5)),
        (lambda x: x.new_ones(len(x), 9, 9, 9), "layer@BHWC", (9, 9, 9)),
        (lambda x: x.new_ones(len(x), 4, 5, 6, 7), "layer@BDHWC", (7, 4, 5, 6)),
        (lambda x: x.new_ones(len(x), 4, 5, 6, 7), "layer@BCDHW", (4, 5, 6, 7)),
    ],
)
def test_layouts_come_out_channels_first(function, layer, shape):
    model = Returns(function)
    taps, shapes = probe(model, [layer], IMAGES)
    name = layer.partition("@")[0]
    assert shapes == {name: shape}
    taps.collect(lambda: model(torch.cat([IMAGES, IMAGES])))
    assert taps.read()[name].shape == (4, *shape)


def test_a_dict_gives_one_feature_per_map():
    model = Returns(lambda x: {"p3": x, "p4": x[..., ::2, ::2], "names": ["a"]})
    _, shapes = probe(model, ["layer"], IMAGES)
    assert shapes == {"layer[p3]": (3, 16, 24), "layer[p4]": (3, 8, 12)}


def test_tokens_keep_their_order_as_a_map():
    grid = torch.arange(24.0).view(1, 4, 6)
    model = Returns(
        nn.Sequential(_Function(lambda x: grid.flatten(1)[..., None].repeat(len(x), 1, 5)), nn.Linear(5, 5))
    )
    model.layer[1].weight.data.copy_(torch.eye(5))
    model.layer[1].bias.data.zero_()
    taps, _ = probe(model, ["layer"], IMAGES)
    taps.collect(lambda: model(IMAGES))
    torch.testing.assert_close(taps.read()["layer"][0, 0], grid[0])


def test_another_image_size_gives_another_grid():
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), _Function(lambda x: x.transpose(1, 2)))
    model = nn.Sequential(net, _Function(lambda x: x.mean(1)))
    taps, shapes = probe(model, ["0"], torch.rand(2, 3, 16, 24))
    assert shapes["0"] == (8, 4, 6)
    taps.collect(lambda: model(torch.rand(3, 3, 32, 48)))
    assert taps.read()["0"].shape == (3, 8, 8, 12)


def test_activations_take_their_layout_from_the_layer_before():
    conv = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU())
    assert probe(conv, ["1"], torch.rand(2, 3, 16, 16))[1] == {"1": (16, 16, 16)}
    linear = nn.Sequential(_Function(lambda x: x.permute(0, 2, 3, 1)), nn.Linear(3, 16), nn.GELU())
    assert probe(linear, ["2"], torch.rand(2, 3, 16, 16))[1] == {"2": (16, 16, 16)}
    taps, _ = probe(linear, ["2"], torch.rand(2, 3, 16, 16))
    images = torch.rand(1, 3, 16, 16)
    output = taps.collect(lambda: linear(images))
    torch.testing.assert_close(output.permute(0, 3, 1, 2), taps.read()["2"])


@pytest.mark.parametrize(
    ("layer", "function", "words"),
    [
        ("laier", lambda x: x, "did you mean 'layer'"),
        ("layer@BXY", lambda x: x, "unknown layout 'BXY'"),
        ("layer@BC", lambda x: x, "which layout BC does not fit"),
        ("layer", lambda x: x.long(), "integers (torch.int64)"),
        ("layer", lambda x: x.new_ones(2, 16, 16, 16), "write 'layer@BCHW' or 'layer@BHWC'"),
        ("layer", lambda x: x.new_ones(2, 5, 7), "write 'layer@BCL' or 'layer@BLC'"),
        ("layer", lambda x: x.sum(), "a batch, a channel and 0 to 3 spatial axes"),
        ("layer[p5]", lambda x: {"p3": x, "p4": x}, "no such tensor; did you mean 'p3' or 'p4'"),
        ("layer[0]", lambda x: x, "one tensor, without entries"),
        ("inner", lambda x: x, "did not run"),
    ],
)
def test_mistakes_name_the_tap_and_the_way_out(layer, function, words):
    with pytest.raises(UserError) as error:
        probe(Returns(function), [layer], torch.rand(2, 3, 16, 16))
    assert words in str(error.value).replace("known: p3, p4", "did you mean 'p3' or 'p4'")
    assert "\n" not in str(error.value)


def test_gradients_pass_and_copies_stay_apart():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    taps, _ = probe(model, ["0"], IMAGES)
    pair = copy.deepcopy((model, taps))
    taps.collect(lambda: model(IMAGES))
    taps.read()["0"].sum().backward()
    assert model[0].weight.grad is not None
    pair[1].collect(lambda: pair[0](IMAGES[:1]))
    assert pair[1].read()["0"].shape[0] == 1
    with pytest.raises(UserError, match="did not run"):
        taps.read()


@pytest.mark.parametrize("first", ["with hooks", "without"])
def test_compiled_models_are_tapped_whatever_ran_first(first):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    taps, _ = probe(model, ["0"], IMAGES)
    expected = model[0](IMAGES)
    model.compile(backend="eager", fullgraph=True)
    if first == "without":
        model(IMAGES)
    for _ in range(2):
        taps.collect(lambda: model(IMAGES))
        torch.testing.assert_close(taps.read()["0"], expected)
        model(IMAGES)
        with pytest.raises(UserError, match="did not run"):
            taps.read()


def test_a_tap_without_gradient_is_known():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), _Function(torch.Tensor.detach))
    assert probe(model, ["1", "0"], IMAGES)[0].without_gradient == ("1",)


def test_a_dry_run_leaves_no_trace():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    probe(model, ["1"], IMAGES)
    assert model.training
    assert model[1].training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_hooks_are_on_while_the_model_is_collected_from_and_never_else():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    handle = model[0].register_forward_hook(lambda *_: None)
    taps, _ = probe(model, ["0"], IMAGES)

    def fail():
        assert len(model[0]._forward_hooks) == 2
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        taps.collect(fail)
    assert len(model[0]._forward_hooks) == 1
    handle.remove()
    assert not model[0]._forward_hooks


class Answer:
    def __init__(self, logits):
        self.logits, self.name = logits, "scores"


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor


Named = collections.namedtuple("Named", ["logits", "aux"])


@pytest.mark.parametrize(
    "wrap",
    [Answer, lambda x: {"logits": x, "hidden": x}, lambda x: Output(None, x), lambda x: Named(x, x + 1)],
)
@pytest.mark.parametrize("tap", ["", "[logits]"])
def test_scores_of_outputs_that_are_objects(wrap, tap):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16 * 24 * 3, 5)

        def forward(self, x):
            return wrap(self.fc(x.flatten(1)))

    model = Model()
    taps, shapes = probe(model, [tap], IMAGES)
    assert shapes == {tap: (5,)}
    taps.collect(lambda: model(IMAGES))
    torch.testing.assert_close(taps.read()[tap], model.fc(IMAGES.flatten(1)))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_output_of_torchscript_can_be_tapped_and_no_layer():
    model = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    taps, _ = probe(model, [""], IMAGES)
    expected = taps.collect(lambda: model(IMAGES))
    torch.testing.assert_close(taps.read()[""], expected)
    with pytest.raises(UserError, match="TorchScript, which cannot be looked into"):
        Taps(model, ["0"])
