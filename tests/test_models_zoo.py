"""The models of the literature: their published sizes, and that all of each learns."""

import pytest
import torch

from diffkd.errors import UserError
from diffkd.features.stages import find_stages
from diffkd.models import cifar, imagenet

PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
    "resnet18": 11_220_132,
    "resnet34": 21_328_292,
    "resnet50": 23_705_252,
}
# The last map's layer and shape for 32x32 pixels.
LAST_MAP = {
    **{name: ("stage3", (64, 8, 8)) for name in PARAMETERS if name.startswith("resnet")},
    **dict.fromkeys(("resnet8x4", "resnet32x4"), ("stage3", (256, 8, 8))),
    **dict.fromkeys(("resnet18", "resnet34"), ("stage4", (512, 4, 4))),
    "resnet50": ("stage4", (2048, 4, 4)),
    **dict.fromkeys(("wrn_16_1", "wrn_40_1"), ("stage4", (64, 8, 8))),
    **dict.fromkeys(("wrn_16_2", "wrn_40_2"), ("stage4", (128, 8, 8))),
    **{name: ("stage4", (512, 4, 4)) for name in PARAMETERS if name.startswith("vgg")},
    "mobilenetv2": ("stage8", (1280, 2, 2)),
    "shufflenetv1": ("stage3", (960, 4, 4)),
    "shufflenetv2": ("stage4", (1024, 4, 4)),
}


def test_the_zoo_is_complete():
    assert set(cifar.names()) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published(name):
    with torch.device("meta"):
        model = cifar.build(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("channels", "size", "classes"), [(3, 32, 100), (1, 28, 7)])
@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_learns(name, channels, size, classes):
    model = cifar.build(name, in_channels=channels, image_size=(size, size), num_classes=classes)
    logits = model(torch.rand(2, channels, size, size))
    assert logits.shape == (2, classes)
    logits.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("size", [40, 64])
@pytest.mark.parametrize("name", PARAMETERS)
def test_larger_pictures(name, size):
    with torch.device("meta"):
        model = cifar.build(name, image_size=(size, size))
        assert model(torch.empty(2, 3, size, size)).shape == (2, 100)


@pytest.mark.parametrize(("size", "side"), [(28, 3), (32, 4), (64, 4)])
def test_vgg_halves_large_pictures_once_more(size, side):
    with torch.device("meta"):
        model, x = cifar.build("vgg8", image_size=(size, size)), torch.empty(2, 3, size, size)
        for stage in (model.stem, model.stage1, model.stage2, model.stage3, model.stage4):
            x = stage(x)
    assert x.shape == (2, 512, side, side)


def test_weights_of_vgg_fit_whatever_the_size():
    with torch.device("meta"):
        small, large = (cifar.build("vgg8", image_size=(side, side)) for side in (32, 64))
    assert small.state_dict().keys() == large.state_dict().keys()


@pytest.mark.parametrize(("name", "std"), [("vgg8", 0.01), ("mobilenetv2", 0.01), ("wrn_16_2", None)])
def test_heads_start_as_published(name, std):
    model = cifar.build(name)
    assert not model.head.bias.any()
    assert std is None or float(model.head.weight.detach().std()) == pytest.approx(std, rel=0.05)
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert not any(m.bias.any() for m in convs if m.bias is not None)
    last = convs[-1].weight.detach()
    assert float(last.std()) == pytest.approx((2 / (last.shape[0] * last[0, 0].numel())) ** 0.5, rel=0.1)


@pytest.mark.parametrize("name", LAST_MAP)
def test_the_last_map_has_a_name(name):
    model, images = cifar.build(name), torch.rand(2, 3, 32, 32)
    layer, shape = LAST_MAP[name]
    assert find_stages(model, lambda: model(images), (32, 32))[-1] == layer
    found = {}
    model.get_submodule(layer).register_forward_hook(lambda m, i, o: found.update(shape=tuple(o.shape[1:])))
    model(images)
    assert found["shape"] == shape


@pytest.mark.parametrize("name", ["shufflenetv2", "vgg8", "wrn_16_1"])
def test_models_compile_without_a_break(name):
    model = torch.compile(cifar.build(name).eval(), backend="eager", fullgraph=True)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 100)


def test_mobilenet_for_imagenet():
    with torch.device("meta"):
        model = imagenet.build("mobilenetv1")
    assert sum(p.numel() for p in model.parameters()) == 4_231_976
    model = imagenet.build("mobilenetv1", num_classes=3)
    logits = model(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_unknown_names():
    with pytest.raises(UserError, match="unknown model 'cifar/resnet8x5'; did you mean 'resnet8x4'"):
        cifar.build("resnet8x5")
    with pytest.raises(UserError, match="unknown model 'imagenet/mobilenet'; did you mean 'mobilenetv1'"):
        imagenet.build("mobilenet")
