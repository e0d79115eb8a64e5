"""Every recipe of detection is built and run for two steps on stand-in data."""

import json

import pytest

import box_files
from diffkd.recipe.files import builtin
from diffkd.recipe.schema import load

RECIPES = [name for name in builtin() if load(name).task.name == "detection"]
# Large models stand aside for small ones of their kind: what is tried is the recipe.
HEAVY = ("resnext101_64x4d", "resnet101", "resnet50", "resnet18", "tf_efficientnet_lite2", "_050", "_100")
TINY = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 24, 32],
    "decoder_in_channels": [32, 32, 32],
    "d_model": 32,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 20,
    "hidden_expansion": 1.0,
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder in the layout of each data set by name."""
    root = tmp_path_factory.mktemp("boxes")
    box_files.voc(root / "boxes", {"train": 4, "val": 2, "test": 2})
    box_files.voc(root / "voc/VOC2007", {"trainval": 4, "test": 2})
    for place in (root / "voc").rglob("*.xml"):
        text = place.read_text()
        place.write_text(text.replace("<name>dim", "<name>cat").replace("<name>bright", "<name>dog"))
    box_files.coco(root / "coco", {"train2017": 4, "val2017": 2})
    (root / "coco/annotations").mkdir()
    for split in ("train2017", "val2017"):
        (root / f"coco/{split}.json").rename(root / f"coco/annotations/instances_{split}.json")
    (root / "coco/annotations/captions_val2017.json").write_text(json.dumps({"annotations": []}))
    return root


def overrides(name, root, tmp_path):
    recipe = load(name)
    words = [] if recipe.data.name == "digit_scenes" else [f"data.root={root / recipe.data.name}"]
    words += (
        ["data.train_scenes=8", "data.test_scenes=4"]
        if recipe.data.name == "digit_scenes"
        else [
            "data.size=64",
            "data.max_size=96",
        ]
    )
    for what, side in (("teacher", recipe.teacher), ("student", recipe.student)):
        options = dict(side.options)
        options.pop("backbone_weights", None)
        if side.model.startswith("transformers/"):
            words.append(f"{what}.model=transformers/rt_detr_v2")
            options = TINY
        elif side.model.endswith(HEAVY):
            words.append(f"{what}.model={side.model.partition(':')[0]}:timm/test_resnet")
            words.append(f"{what}.freeze=[backbone.body.conv1]" if side.freeze else f"{what}.freeze=[]")
            options = options | {"channels": 32, "levels": [3, 5]}
        words.append(f"{what}.options={json.dumps(options)}")
    words += ["teacher.train=null", "data.batch_size=2", "data.workers=0", "trainer.precision=fp32"]
    return [*words, "trainer.max_steps=2", "trainer.accelerator=cpu", f"output={tmp_path / 'run'}"]


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps(name, stand_in, tmp_path, diffkd):
    status, _, err = diffkd("distill", name, *overrides(name, stand_in, tmp_path))
    assert status == 0, err
    header = (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    assert "ap50" in header
    assert ".diffusion" in header


def test_published_labels_of_coco_are_kept(stand_in):
    from diffkd.data.coco import build

    data = build(str(stand_in / "coco"), size=64)
    assert data.num_classes == 7
    assert data.class_names[6] == "dim"
    assert data.class_names[2] == "bright"
    assert set(data.train[0][1]["labels"].tolist()) <= {2, 6}
