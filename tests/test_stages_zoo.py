"""The last feature map of many models: in front of the head, whatever the head is."""

import warnings

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from torchvision.models import detection, segmentation, video

from diffkd import Distiller
from diffkd.features.stages import find_stages
from diffkd.features.taps import Taps
from diffkd.features.watch import dry_run

hub = torchvision.models
PICTURE, SMALL = (3, 64, 64), (3, 32, 32)
VIT = {
    "hidden_size": 24,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
STAGED = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
HEADS = {"num_attention_heads": [1, 1, 2, 2]}
WINDOWED = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "num_heads": [1, 1, 2, 2], "window_size": 2}


def of_torchvision(name, **options):
    return lambda: getattr(hub, name)(weights=None, num_classes=5, **options)


def of_timm(name, **options):
    return lambda: timm.create_model(name, num_classes=5, **options)


def of_transformers(name, kind="ImageClassification", **options):
    config = getattr(transformers, f"{name}Config")
    return lambda: getattr(transformers, f"{name}For{kind}")(config(num_labels=5, **options))


def segmenter(name, **options):
    return lambda: getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=5, **options)


def vit(depth):
    return lambda: hub.VisionTransformer(32, 8, depth, 2, 24, 32, num_classes=5)


def small_timm_vit(name, depth, **options):
    return of_timm(name, img_size=32, embed_dim=24, depth=depth, num_heads=2, patch_size=8, **options)


def conv(dims):
    layer, pool = {1: (nn.Conv1d, nn.AdaptiveAvgPool1d), 3: (nn.Conv3d, nn.AdaptiveAvgPool3d)}[dims]
    return lambda: nn.Sequential(
        layer(3, 8, 3, 2, 1),
        nn.ReLU(),
        layer(8, 12, 3, 2, 1),
        nn.ReLU(),
        pool(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.lstm(x)[0])


# model: how it is made, one sample's shape, the last feature map's layer and shape `(C, *S)`
MODELS = {
    "alexnet": (of_torchvision("alexnet"), PICTURE, "features.11", (256, 3, 3)),
    "squeezenet1_1": (of_torchvision("squeezenet1_1"), PICTURE, "features", (512, 3, 3)),
    "googlenet": (of_torchvision("googlenet", init_weights=False), PICTURE, "inception5b", (1024, 2, 2)),
    "mnasnet0_5": (of_torchvision("mnasnet0_5"), PICTURE, "layers", (1280, 2, 2)),
    "mobilenet_v2": (of_torchvision("mobilenet_v2", width_mult=0.25), PICTURE, "features", (1280, 2, 2)),
    "efficientnet_b0": (of_torchvision("efficientnet_b0"), PICTURE, "features", (1280, 2, 2)),
    "resnext": (
        lambda: hub.ResNet(hub.resnet.Bottleneck, [1] * 4, 5, groups=4, width_per_group=4),
        PICTURE,
        "layer4",
        (2048, 2, 2),
    ),
    "densenet": (lambda: hub.DenseNet(8, (1, 1, 1, 1), 16, num_classes=5), PICTURE, "features", (17, 2, 2)),
    "swin (torchvision)": (
        lambda: hub.SwinTransformer([4, 4], 8, [1] * 4, [1, 1, 2, 2], [4, 4], num_classes=5),
        PICTURE,
        "permute",
        (64, 2, 2),
    ),
    **{
        f"vit of {depth} (torchvision)": (vit(depth), SMALL, "encoder.layers", (24, 4, 4))
        for depth in range(2, 13)
    },
    **{
        f"vit of {depth} (transformers)": (
            of_transformers("ViT", num_hidden_layers=depth, **VIT),
            SMALL,
            f"vit.layers.{depth - 1}",
            (24, 4, 4),
        )
        for depth in range(2, 13)
    },
    "deit": (of_transformers("DeiT", num_hidden_layers=3, **VIT), SMALL, "deit.layers.2", (24, 4, 4)),
    "dinov2": (
        of_transformers("Dinov2", num_hidden_layers=3, **VIT),
        SMALL,
        "dinov2.encoder.layer.2",
        (24, 4, 4),
    ),
    "beit": (of_transformers("Beit", num_hidden_layers=3, **VIT), SMALL, "beit.layernorm", (24, 4, 4)),
    "swin": (
        of_transformers("Swin", depths=[1, 1, 2, 1], **WINDOWED),
        PICTURE,
        "swin.layernorm",
        (64, 2, 2),
    ),
    "swinv2": (
        of_transformers("Swinv2", depths=[1, 1, 2, 1], **WINDOWED),
        PICTURE,
        "swinv2.layernorm",
        (64, 2, 2),
    ),
    "segformer": (
        of_transformers("Segformer", "SemanticSegmentation", decoder_hidden_size=16, **STAGED, **HEADS),
        PICTURE,
        "segformer.stages.3",
        (16, 2, 2),
    ),
    "segformer classifier": (
        of_transformers("Segformer", **STAGED, **HEADS),
        PICTURE,
        "segformer.stages.3",
        (16, 2, 2),
    ),
    "resnet": (
        of_transformers("ResNet", embedding_size=8, layer_type="basic", **STAGED),
        PICTURE,
        "resnet.encoder.stages.3",
        (16, 2, 2),
    ),
    "regnet": (
        of_transformers("RegNet", embedding_size=8, groups_width=8, **STAGED),
        PICTURE,
        "regnet.encoder.stages.3",
        (16, 2, 2),
    ),
    "convnext": (of_transformers("ConvNext", **STAGED), PICTURE, "convnext.encoder.stages.3", (16, 2, 2)),
    "convnextv2": (
        of_transformers("ConvNextV2", **STAGED),
        PICTURE,
        "convnextv2.encoder.stages.3",
        (16, 2, 2),
    ),
    "mobilenetv2 (transformers)": (
        of_transformers("MobileNetV2", depth_multiplier=0.35),
        PICTURE,
        "mobilenet_v2.conv_1x1",
        (1280, 2, 2),
    ),
    "pvt": (
        of_transformers("Pvt", image_size=64, **STAGED, **HEADS),
        PICTURE,
        "pvt.encoder.layer_norm",
        (16, 2, 2),
    ),
    "poolformer": (of_transformers("PoolFormer", **STAGED), PICTURE, "norm", (16, 2, 2)),
    "deeplabv3": (
        segmenter("deeplabv3_mobilenet_v3_large", aux_loss=True),
        PICTURE,
        "backbone.16",
        (960, 4, 4),
    ),
    "fcn": (segmenter("fcn_resnet50"), PICTURE, "backbone.layer4", (2048, 8, 8)),
    "lraspp": (segmenter("lraspp_mobilenet_v3_large"), PICTURE, "backbone.16", (960, 4, 4)),
    "conv1d": (conv(1), (3, 32), "3", (12, 8)),
    "conv3d": (conv(3), (3, 8, 16, 16), "3", (12, 2, 4, 4)),
    "r3d": (lambda: video.r3d_18(weights=None, num_classes=5), (3, 4, 32, 32), "layer4", (512, 1, 2, 2)),
    "lstm": (Recurrent, (7, 6), "lstm[0]", (8, 7)),
    "vit (timm)": (small_timm_vit("vit_tiny_patch16_224", 3), SMALL, "blocks.2", (24, 4, 4)),
    "siglip": (small_timm_vit("vit_base_patch16_siglip_gap_224", 2), SMALL, "blocks.1", (24, 4, 4)),
    "eva02": (small_timm_vit("eva02_tiny_patch14_224", 2), SMALL, "blocks.1", (24, 4, 4)),
    "deit distilled": (small_timm_vit("deit_tiny_distilled_patch16_224", 3), SMALL, "blocks.2", (24, 4, 4)),
    "cait": (small_timm_vit("cait_xxs24_224", 2), SMALL, "blocks.1", (24, 4, 4)),
    "swin (timm)": (
        of_timm(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            embed_dim=8,
            depths=(1, 1, 2, 1),
            num_heads=(1, 1, 2, 2),
            window_size=2,
        ),
        PICTURE,
        "layers.3",
        (64, 2, 2),
    ),
    "pvt_v2": (of_timm("pvt_v2_b0", depths=(1, 1, 1, 1)), PICTURE, "stages.3", (256, 2, 2)),
    "repvit": (
        of_timm("repvit_m0_9", embed_dim=(8, 16, 16, 16), depth=(1, 1, 1, 1)),
        PICTURE,
        "stages.3",
        (16, 2, 2),
    ),
    "resnetv2": (
        of_timm("resnetv2_50", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), stem_chs=8),
        PICTURE,
        "stages.3",
        (16, 2, 2),
    ),
    "fastvit": (
        of_timm("fastvit_t8", embed_dims=(8, 8, 16, 16), layers=(1, 1, 1, 1)),
        PICTURE,
        "stages.3",
        (16, 2, 2),
    ),
    "mobilevit": (of_timm("mobilevit_xxs"), PICTURE, "final_conv", (320, 2, 2)),
    "mobilenetv4": (of_timm("mobilenetv4_conv_small_050"), PICTURE, "blocks.4", (480, 2, 2)),
    "regnetx": (of_timm("regnetx_002"), PICTURE, "s4", (368, 2, 2)),
    "coat_lite": (of_timm("coat_lite_tiny", img_size=64), PICTURE, "norm4", (320, 2, 2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_last_feature_map(name):
    make, shape, layer, expected = MODELS[name]
    torch.manual_seed(0)
    model, images = make(), torch.rand(2, *shape)
    stages = find_stages(model, lambda: model(images), shape[1:])
    taps = Taps(model, stages)
    with dry_run(model):
        shapes = taps.probe(lambda: model(images), shape[1:])
    assert list(shapes.items())[-1] == (layer, expected)
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [h for h in hooks if (getattr(h, "__module__", None) or "").startswith("diffkd")]
    assert all(p.requires_grad for p in model.parameters())


def test_blocks_of_a_small_vit_are_its_blocks():
    model, images = vit(2)(), torch.rand(2, *SMALL)
    assert find_stages(model, lambda: model(images), (32, 32)) == [
        "encoder.layers.encoder_layer_0",
        "encoder.layers",
    ]


DETECTORS = ["retinanet_resnet50_fpn", "fcos_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"]


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_are_tapped_at_the_pyramid_that_their_heads_look_at(name):
    options = {"weights": None, "weights_backbone": None, "num_classes": 5, "min_size": 64, "max_size": 64}
    model, images = getattr(detection, name)(**options), [torch.rand(3, 50, 64)] * 2
    assert find_stages(model, lambda: model(images), (50, 64)) == ["backbone"]


def test_a_model_without_maps_is_said():
    def flat(width):
        return nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, 5))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        distiller = Distiller(flat(4), flat(8), None, "kd", torch.rand(2, 3, 8, 8))
    assert not said  # nothing but the output was wanted
    with pytest.warns(UserWarning, match="no feature map was found in the (student|teacher)"):
        distiller = Distiller(flat(4), flat(8), None, "diffkd", torch.rand(2, 3, 8, 8))
    assert [pair.name for pair in distiller.pairs] == ["output"]


def test_recurrent_and_detecting_models_teach_without_a_tap_given():
    distiller = Distiller(Recurrent(), Recurrent(), None, "fitnet", torch.rand(2, 7, 6))
    assert [pair.name for pair in distiller.pairs] == ["lstm[0]"]
    assert bool(distiller(torch.rand(2, 7, 6)).total.isfinite())
