"""The models of the literature: their published sizes, and that all of each learns."""

import pytest
import torch

from diffkd.errors import UserError
from diffkd.models import cifar, imagenet
from diffkd.stages import find_stages

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
# Channels of the last map, which is 8x8 or, of models with more stages, 4x4 or 2x2 for 32x32 pixels.
LAST_MAP = {
    "resnet8x4": ("stage3", (256, 8, 8)),
    "resnet50": ("stage4", (2048, 4, 4)),
    "wrn_16_2": ("stage4", (128, 8, 8)),
    "vgg8": ("stage4", (512, 2, 2)),
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


@pytest.mark.parametrize("name", [n for n in PARAMETERS if n not in ("resnet110", "vgg19", "resnet34")])
def test_every_parameter_learns(name):
    model = cifar.build(name, in_channels=1, num_classes=7)
    logits = model(torch.rand(2, 1, 28, 28))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", LAST_MAP)
def test_the_last_map_has_a_name(name):
    model, images = cifar.build(name), torch.rand(2, 3, 32, 32)
    layer, shape = LAST_MAP[name]
    assert find_stages(model, lambda: model(images), (32, 32))[-1] == layer
    found = {}
    model.get_submodule(layer).register_forward_hook(lambda m, i, o: found.update(shape=tuple(o.shape[1:])))
    model(images)
    assert found["shape"] == shape


def test_models_compile_without_a_break():
    model = torch.compile(cifar.build("shufflenetv2").eval(), backend="eager", fullgraph=True)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 100)


def test_mobilenet_for_imagenet():
    with torch.device("meta"):
        model = imagenet.build("mobilenetv1")
    assert sum(p.numel() for p in model.parameters()) == 4_231_976
    assert imagenet.build("mobilenetv1", num_classes=3)(torch.rand(2, 3, 64, 64)).shape == (2, 3)


def test_unknown_names():
    with pytest.raises(UserError, match="unknown model 'cifar/resnet8x5'; did you mean 'resnet8x4'"):
        cifar.build("resnet8x5")
    with pytest.raises(UserError, match="unknown model 'imagenet/mobilenet'; did you mean 'mobilenetv1'"):
        imagenet.build("mobilenet")
