"""Default taps of model families that were not written for this library."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from diffkd import Distiller
from diffkd.features.stages import find_stages
from diffkd.features.taps import Taps
from diffkd.features.watch import dry_run
from diffkd.models.base import build

# family: pictures' size, last map `(C, H, W)`, number of stages
TORCHVISION = {
    "resnet18": (64, (512, 2, 2), 5),
    "mobilenet_v3_small": (64, (576, 2, 2), 5),
    "vgg11_bn": (64, (512, 2, 2), 6),
    "densenet121": (64, (1024, 2, 2), 5),
    "shufflenet_v2_x0_5": (64, (1024, 2, 2), 5),
    "regnet_y_400mf": (64, (440, 2, 2), 5),
    "convnext_tiny": (64, (768, 2, 2), 4),
    "swin_t": (64, (768, 2, 2), 4),
}
TIMM = {
    "resnet10t": (64, (512, 2, 2), 5),
    "convnext_atto": (64, (320, 2, 2), 4),
    "mobilenetv3_small_050": (64, (288, 2, 2), 5),
    "efficientnet_lite0": (64, (320, 2, 2), 5),
    "repvgg_a0": (64, (1280, 2, 2), 5),
    "vit_tiny_patch16_224": (224, (192, 14, 14), 4),
    "deit_tiny_distilled_patch16_224": (224, (192, 14, 14), 4),
    "swin_tiny_patch4_window7_224": (224, (768, 7, 7), 4),
    "mixer_s32_224": (224, (512, 7, 7), 4),
    "xcit_nano_12_p16_224": (224, (128, 14, 14), 4),
    "twins_svt_small": (64, (512, 2, 2), 4),
    "levit_128s": (224, (384, 4, 4), 3),
}


def shapes_of(model, images):
    stages = find_stages(model, lambda: model(images), tuple(images.shape[2:]))
    taps = Taps(model, stages)
    with dry_run(model):
        return list(taps.probe(lambda: model(images), tuple(images.shape[2:])).values())


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    size, last, count = TORCHVISION[name]
    found = shapes_of(getattr(torchvision.models, name)(weights=None), torch.rand(2, 3, size, size))
    assert (found[-1], len(found)) == (last, count)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    size, last, count = TIMM[name]
    found = shapes_of(timm.create_model(name, num_classes=5), torch.rand(2, 3, size, size))
    assert (found[-1], len(found)) == (last, count)


def test_register_and_class_tokens_are_left_out():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, reg_tokens=4, class_token=True, num_classes=5
    )
    assert shapes_of(model, torch.rand(2, 3, 64, 64))[-1] == (192, 4, 4)


def test_torchvision_vit_gives_blocks():
    model = torchvision.models.VisionTransformer(64, 16, 8, 2, 24, 48)
    assert shapes_of(model, torch.rand(2, 3, 64, 64)) == [(24, 4, 4)] * 4


def test_blocks_of_residual_networks_stay_whole():
    model = torchvision.models.resnet18()
    images = torch.rand(2, 3, 64, 64)
    assert find_stages(model, lambda: model(images), (64, 64)) == [
        "relu",
        "layer1",
        "layer2",
        "layer3",
        "layer4",
    ]


def test_wrapped_models_and_models_without_maps():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torchvision.models.resnet18()

        def forward(self, x):
            return self.backbone(x)

    model, images = Wrapped(), torch.rand(2, 3, 64, 64)
    assert find_stages(model, lambda: model(images), (64, 64))[-1] == "backbone.layer4"
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 5))
    assert find_stages(flat, lambda: flat(images), (64, 64)) == []


PAIRS = [
    ("timm/vit_tiny_patch16_224", "timm/resnet10t"),
    ("timm/resnet10t", "timm/vit_tiny_patch16_224"),
    ("timm/swin_tiny_patch4_window7_224", "timm/vit_tiny_patch16_224"),
    ("timm/convnext_atto", "cifar/mobilenetv2"),
    ("timm/mixer_s32_224", "torchvision/mobilenet_v3_small"),
]


@pytest.mark.filterwarnings("ignore:tap .*resized to the smaller")
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_models_of_different_kinds_teach_each_other_without_a_tap_given(teacher, student):
    teacher, student = (build(name, num_classes=5, image_shape=(3, 224, 224)) for name in (teacher, student))
    images = torch.rand(2, 3, 224, 224)
    distiller = Distiller(student, teacher, sample=images)
    feature, logits = distiller.pairs
    assert feature.student.spatial_dims == feature.teacher.spatial_dims == 2
    assert logits.is_logits
    for _ in range(2):
        losses = distiller(images)
        losses.total.backward()
        assert bool(losses.total.isfinite())
