"""Models by name, and pictures as each of them wants them."""

import pytest
import timm
import torch

from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.models.base import Preprocess, build, published_state, wants
from diffkd.recipe.schema import ModelRecipe
from diffkd.recipe.sides import build_side

SHAPE = (3, 64, 64)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm/resnet10t", {"drop_path_rate": 0.1}),
        ("timm/vit_tiny_patch16_224", {}),
        ("torchvision/resnet18", {}),
        ("torchvision/googlenet", {}),
        ("torchvision/mobilenet_v3_small", {"dropout": 0.1}),
        ("simple/cnn4", {}),
    ],
)
def test_sources_give_logits_in_training_mode_too(name, options):
    model = build(name, num_classes=7, image_shape=SHAPE, options=options)
    assert model.train()(torch.rand(2, *SHAPE)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm/resnet5", "unknown model 'timm/resnet5'; did you mean 'resnet50"),
        ("torchvision/resnet5", "did you mean 'resnet50'"),
        ("resnet50", "has no source; write one of"),
        ("tim/resnet50", "unknown model source 'tim'; did you mean 'timm'"),
        ("no_such_module:build", "cannot be loaded: ModuleNotFoundError"),
        ("collections:OrderedDic", "did you mean 'OrderedDict'"),
    ],
)
def test_unknown_models(name, words):
    with pytest.raises(UserError) as error:
        build(name, num_classes=5, image_shape=SHAPE)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm/resnet18", "model 'timm/resnet18' cannot be built"),
        ("torchvision/resnet18", "model 'torchvision/resnet18' cannot be built"),
        ("simple/cnn4", "model 'simple/cnn4' takes no option 'depht'"),
    ],
)
def test_unknown_options(name, words):
    with pytest.raises(UserError) as error:
        build(name, num_classes=5, image_shape=SHAPE, options={"depht": 3})
    assert words in str(error.value)


def test_weights_that_do_not_exist():
    with pytest.raises(
        UserError, match="nor weights of that name for 'timm/resnet50'; did you mean 'a1_in1k'"
    ):
        published_state("timm/resnet50", "a1_in1")
    with pytest.raises(UserError, match="did you mean 'IMAGENET1K_V1'"):
        published_state("torchvision/resnet18", "IMAGENET1K_V3")
    with pytest.raises(UserError, match="'simple/cnn4' has no published weights"):
        published_state("simple/cnn4", "pretrained")


def test_weights_that_cannot_be_fetched(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(
        UserError, match="weights 'pretrained' of 'timm/resnet18' cannot be fetched: no route"
    ):
        published_state("timm/resnet18", "pretrained")


def test_what_models_want_to_see():
    assert wants("timm/resnet18", None).size is None
    assert wants("timm/vit_tiny_patch16_224", None).size == 224
    lite = wants("timm/tf_efficientnet_lite2", "pretrained")
    assert (lite.size, lite.mean, lite.channels) == (260, (0.5, 0.5, 0.5), 3)
    assert wants("torchvision/resnet18", "IMAGENET1K_V1").mean == (0.485, 0.456, 0.406)
    assert wants("torchvision/vit_b_16", None).size == 224


def data(shape=(1, 28, 28)):
    return Data([], [], 5, shape, mean=(0.1,) * shape[0], std=(0.2,) * shape[0])


def test_each_side_sees_pictures_its_own_way():
    side = build_side(ModelRecipe(model="timm/vit_tiny_patch16_224"), data((3, 32, 32)))
    assert side.prepare(torch.rand(2, 3, 32, 32)).shape == (2, 3, 224, 224)
    assert side.notes == ["pictures of 32x32 resized to 224x224"]
    side = build_side(ModelRecipe(model="timm/vit_tiny_patch16_224", size=64), data((3, 32, 32)))
    assert side.model(side.prepare(torch.rand(2, 3, 32, 32))).shape == (2, 5)
    side = build_side(ModelRecipe(model="simple/cnn4", mean=[0.5], std=[0.25]), data())
    white = torch.full((1, 1, 28, 28), 255, dtype=torch.uint8)
    assert side.prepare(white).max().item() == pytest.approx(2.0)


def test_grey_pictures_for_models_of_three_channels():
    side = build_side(ModelRecipe(model="torchvision/resnet18"), data())
    images = side.prepare(torch.rand(2, 1, 28, 28))
    assert images.shape == (2, 3, 28, 28)
    assert side.model(images).shape == (2, 5)


def test_lists_of_pictures_keep_their_sizes():
    prepared = Preprocess((0.5,) * 3, (0.5,) * 3)([torch.rand(3, 8, 9), torch.rand(3, 5, 4)])
    assert [tuple(p.shape) for p in prepared] == [(3, 8, 9), (3, 5, 4)]
