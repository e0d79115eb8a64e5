"""Segmentation models of every source: trained for a step, tapped in front of the classifier."""

import sys

import pytest
import torch
from torch import nn

from diffkd.batch import Batch
from diffkd.data.base import Data
from diffkd.distiller import Distiller
from diffkd.errors import UserError
from diffkd.models import base as models
from diffkd.tasks.segmentation import Segmentation, known_taps

K = 5
# layer of the feature, its channels and stride; stride of the logits
TAPS = {
    "smp/unet:resnet18": ("decoder", 16, 1, 1),
    "smp/deeplabv3plus:tu-mobilenetv3_small_050": ("decoder", 256, 4, 4),
    "smp/fpn:resnet18": ("decoder", 128, 4, 4),
    "smp/pspnet:resnet18": ("decoder", 512, 8, 8),
    "smp/segformer:mobilenet_v2": ("decoder", 256, 4, 4),
    "torchvision/deeplabv3_mobilenet_v3_large": ("classifier.3", 256, 16, 16),
    "torchvision/fcn_resnet50": ("classifier.2", 512, 8, 8),
    "torchvision/lraspp_mobilenet_v3_large": ("classifier.cbr", 128, 16, 8),
    "transformers/segformer-b0": ("decode_head.activation", 256, 4, 4),
    "transformers/upernet-swin_tiny": ("decode_head.fpn_bottleneck", 512, 4, 4),
    "simple/unet4": ("decoder", 4, 2, 2),
}


def build(name, size=(64, 64), **options):
    return models.build(name, num_classes=K, image_shape=(3, *size), options=options)


@pytest.mark.parametrize("name", TAPS)
def test_every_source_learns_and_is_tapped(name):
    torch.manual_seed(0)
    student, teacher = build(name), build("simple/unet8")
    layer, channels, stride, logit_stride = TAPS[name]
    task = Segmentation(Data([], [], K, (3, 64, 64)))
    batch = Batch(torch.rand(2, 3, 60, 64), torch.randint(0, K, (2, 60, 64)))
    distiller = Distiller(student, teacher, None, "kd", batch, task=task, logits=task.logits)
    assert known_taps(student)[0] == layer
    feature = Distiller(student, teacher, None, "fitnet", batch, task=task, logits=task.logits).pairs[0]
    assert feature.student.shape == (channels, 64 // stride, 64 // stride)
    assert [p.is_logits for p in distiller.pairs][-1]
    assert distiller.pairs[-1].student.shape == (K, 64 // logit_stride, 64 // logit_stride)
    losses = distiller(batch)
    (losses.total + sum(losses.supervised.values())).backward()
    silent = [n for n, p in student.named_parameters() if p.grad is None]
    # smp's PSPNet leaves its encoder's deep stages unused, UPerNet's auxiliary head is for its own loss
    unused = ("encoder.layer3", "encoder.layer4") if "pspnet" in name else ("auxiliary_head", "backbone.")
    assert not [n for n in silent if not n.startswith(unused)]
    auxiliary = name.startswith(("torchvision/deeplab", "torchvision/fcn"))
    assert ("auxiliary" in losses.supervised) == auxiliary
    student.eval()
    with torch.no_grad():
        assert task.predict(student, Batch(torch.rand(1, 3, 50, 64))).shape == (1, K, 50, 64)


def test_mask2former_gives_class_scores_per_position():
    backbone = {"model_type": "swin", "embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]}
    backbone |= {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    options = {"decoder_layers": 2, "encoder_layers": 1, "num_queries": 8, "hidden_dim": 32}
    options |= {"feature_size": 32, "mask_feature_size": 32, "num_attention_heads": 2, "dim_feedforward": 32}
    net = build("transformers/mask2former", backbone_config=backbone, encoder_feedforward_dim=32, **options)
    scores = net(torch.rand(2, 3, 64, 64))
    assert scores.shape == (2, K, 16, 16)
    assert (scores.exp().sum(1) > 0).all()
    scores.mean().backward()
    assert tapped(net) == [
        ("model.pixel_level_module.decoder.mask_projection", (32, 16, 16)),
        ("", (K, 16, 16)),
    ]


class Dict(nn.Module):
    """Logits and others in a dict, as torchvision's models give them, by layers of other names."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, K, 1)

    def forward(self, x):
        x = self.first(x).relu()
        return {"aux": x, "out": self.last(x)}


def tapped(teacher):
    """Where a student learns from a teacher by default, and what is tapped there."""
    task = Segmentation(Data([], [], K, (3, 64, 64)))
    batch = Batch(torch.rand(2, 3, 64, 64), torch.randint(0, K, (2, 64, 64)))
    distiller = Distiller(
        build("simple/unet4"), teacher, None, "diffkd", batch, task=task, logits=task.logits
    )
    assert [(p.student.layer, p.is_logits) for p in distiller.pairs][-1] == ("segmentation_head.0", True)
    assert torch.isfinite(distiller(batch).total)
    return [(p.teacher.layer, p.teacher.shape) for p in distiller.pairs]


def test_models_that_nobody_knows_are_tapped_too():
    assert tapped(Dict()) == [("first", (6, 32, 32)), ("[out]", (K, 32, 32))]
    with pytest.warns(UserWarning, match="no feature map was found in the teacher"):
        assert tapped(nn.Conv2d(3, K, 3, padding=1)) == [("", (K, 64, 64))]
    assert tapped(build("transformers/mobilevit"))[1][0] == "[logits]"


def test_weights_of_an_encoder_from_a_file(tmp_path):
    torch.manual_seed(0)
    for name, source, option in (
        ("smp/unet:tu-mobilenetv3_small_050", "timm/mobilenetv3_small_050", "encoder_weights"),
        ("smp/unet:tu-convnext_atto", "timm/convnext_atto", "encoder_weights"),
        ("torchvision/fcn_resnet50", "torchvision/resnet50", "backbone_weights"),
    ):
        torch.save(build(source).state_dict(), tmp_path / "weights.pth")
        net = build(name, **{option: str(tmp_path / "weights.pth")})
        part = net.encoder if option == "encoder_weights" else net.backbone
        found = torch.load(tmp_path / "weights.pth")
        for key, value in part.state_dict().items():
            plain = next(
                k for k in found if k.replace(".", "_") == key.removeprefix("model.").replace(".", "_")
            )
            assert torch.equal(found[plain], value), key
    with pytest.raises(UserError, match=r"backbone 'resnet18': .* lacks \d+ of its \d+ tensors"):
        build("smp/unet:resnet18", encoder_weights=str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smp/unett:resnet18", "unknown model 'smp/unett:resnet18'; did you mean 'unet'"),
        ("smp/unet", "needs an encoder, such as 'smp/unet:resnet34'"),
        ("smp/unet:resnet19", "unknown encoder 'resnet19'"),
        ("smp/unet:tu-resnet9999", "timm has no encoder 'resnet9999'"),
        ("transformers/segfomer-b0", "unknown model 'transformers/segfomer-b0'; did you mean 'segformer-b0'"),
        ("transformers/segformer-b9", "unknown model"),
    ],
)
def test_names_that_mean_nothing_are_refused(name, says):
    with pytest.raises(UserError, match=says):
        build(name)


def test_unknown_options_are_refused():
    for name in ("smp/unet:resnet18", "transformers/segformer-b0"):
        with pytest.raises(UserError, match="colour"):
            build(name, colour=3)


def test_a_missing_library_is_one_line(monkeypatch):
    for library, name in (
        ("segmentation_models_pytorch", "smp/unet:resnet18"),
        ("transformers", "transformers/segformer-b0"),
    ):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(UserError, match=r"pip install 'diffkd\[segmentation\]'"):
            build(name)
