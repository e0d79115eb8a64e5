"""Public data sets as they come, with stand-in content; every recipe of segmentation for two steps."""

import json

import numpy as np
import pytest
from PIL import Image

from diffkd.data.base import builder
from diffkd.errors import UserError
from diffkd.recipe.files import builtin
from diffkd.recipe.schema import load
from mask_cases import save, scene, street

RANDOM = np.random.default_rng(0)


def pair(picture_place, mask_place, values, size=(40, 64)):
    """A picture and a mask whose classes have the values given, one of each at least."""
    picture, mask = scene(RANDOM, size)
    mask = np.array([*values, *[values[0]] * 253])[mask % 3].astype(np.uint8)
    mask[-1, : len(values)] = values
    save(picture_place, picture)
    save(mask_place, mask)
    return mask


def cityscapes(root):
    for split in ("train", "val"):
        for i in range(4):
            name = f"{split}/aachen/aachen_{i:06}_000019"
            pair(
                root / f"leftImg8bit/{name}_leftImg8bit.png",
                root / f"gtFine/{name}_gtFine_labelIds.png",
                [7, 33, 0],
            )
    return root


def voc_segmentation(root):
    for split in ("train", "val"):
        place = root / f"ImageSets/Segmentation/{split}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("".join(f"{split}_{i}\n" for i in range(4)))
        for i in range(4):
            name = f"{split}_{i}"
            pair(root / f"JPEGImages/{name}.jpg", root / f"SegmentationClass/{name}.png", [0, 20, 255])
    return root


def ade20k(root):
    for split in ("training", "validation"):
        for i in range(4):
            pair(root / f"images/{split}/{i}.jpg", root / f"annotations/{split}/{i}.png", [1, 150, 0])
    rows = [f"{i}\t0.1\t1\t1\tthing {i}, object" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    return root


def camvid(root):
    for split in ("train", "test"):
        for i in range(4):
            pair(root / f"{split}/{i}.png", root / f"{split}annot/{i}.png", [0, 10, 11])
    return root


SOURCES = {
    "cityscapes": (cityscapes, 19, ("road", "bicycle")),
    "voc_segmentation": (voc_segmentation, 21, ("background", "tvmonitor")),
    "ade20k": (ade20k, 150, ("thing 1", "thing 150")),
    "camvid": (camvid, 11, ("sky", "bicyclist")),
    "masks": (lambda root: street(root, count=4, size=(40, 64)), 3, ("0", "2")),
}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    made = {}

    def root(name):
        if name not in made:
            made[name] = SOURCES[name][0](tmp_path_factory.mktemp(name))
        return made[name]

    return root


@pytest.mark.parametrize("name", SOURCES)
def test_data_sets_as_they_come(name, stand_in):
    _, count, names = SOURCES[name]
    data = builder(name)(str(stand_in(name)))
    assert data.num_classes == count
    assert (data.class_names[0], data.class_names[-1]) == names
    image, mask = data.test[0]
    assert image.shape == (3, 40, 64)
    found = mask.unique().tolist()
    assert found[0] == 0
    assert found[-1] == 255
    assert count - 1 in found
    if name != "masks":
        with pytest.raises(UserError, match=r"no (folder|list|pictures)"):
            builder(name)(str(stand_in("masks").parent))


def test_outlines_become_label_maps(tmp_path):
    square, run = [[2, 2, 8, 2, 8, 6, 2, 6]], {"size": [10, 12], "counts": [0, 10, 110]}
    for split in ("train", "test"):
        save(tmp_path / split / "a.png", np.zeros((10, 12, 3), np.uint8))
        rows = [
            {"id": 1, "image_id": 5, "category_id": 9, "segmentation": square, "iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 4, "segmentation": run, "iscrowd": 1},
            {"id": 3, "image_id": 5, "category_id": 4, "segmentation": [[6, 4, 11, 4, 11, 9, 6, 9]]},
        ]
        content = {
            "images": [{"id": 5, "file_name": "a.png", "height": 10, "width": 12}],
            "categories": [{"id": 9, "name": "car"}, {"id": 4, "name": "tree"}],
            "annotations": rows,
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    data = builder("coco_segmentation")(str(tmp_path))
    assert data.class_names == ("ground", "tree", "car")
    mask = data.test[0][1].numpy()
    assert (mask[:, 0] == 1).all()
    assert (mask[2:4, 2:8] == 2).all()
    assert (mask[4:6, 6:8] == 255).all()
    assert (mask[6:9, 6:11] == 1).all()
    assert mask[0, 5] == 0
    for broken, says in (
        (content | {"images": [{"id": 5, "file_name": "a.png"}]}, "no 'height'"),
        (content | {"annotations": [7]}, "an annotation is no object but 7"),
        (content | {"images": []}, "annotation 1: no image has the id 5"),
    ):
        (tmp_path / "test.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=f"test.json'.*{says}"):
            builder("coco_segmentation")(str(tmp_path))
    rows[0]["segmentation"] = []
    (tmp_path / "test.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"test.json', annotation 1 has no outline"):
        builder("coco_segmentation")(str(tmp_path))


RECIPES = {name: load(name) for name in builtin() if load(name).task.name == "segmentation"}
TEACHERS = [recipe.teacher.model for recipe in RECIPES.values()]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_for_two_steps(name, stand_in, tmp_path, diffkd):
    recipe, place = RECIPES[name], list(RECIPES).index(name)
    words = ["trainer.max_steps=2", "trainer.accelerator=cpu", f"output={tmp_path / 'run'}"]
    words += ["teacher.train=null", "trainer.eval_every=null", "trainer.precision=fp32"]
    if recipe.data.name == "digit_scenes":
        words += ["data.train_scenes=64", "data.test_scenes=4"]
    else:
        words += [f"data.root={stand_in(recipe.data.name)}", "data.workers=0", "data.batch_size=2"]
        words += ["data.crop_size=[32,64]"]
    if recipe.teacher.model in TEACHERS[:place]:  # built and run by another recipe's test
        words.append("teacher=smp/deeplabv3:resnet18")
    for section in ("teacher", "student"):
        given = section == "teacher" and words[-1].startswith("teacher=")
        if "encoder_weights" in getattr(recipe, section).options and not given:
            words.append(f"{section}.options.encoder_weights=null")
    status, _, err = diffkd("distill", name, *words)
    assert status == 0, err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 2
    assert 0 <= summary["last"]["miou"] <= 1
    assert summary["extra_parameters"] > 0


def test_palettes_are_kept(stand_in):
    place = next((stand_in("voc_segmentation") / "SegmentationClass").iterdir())
    saved = Image.open(place).convert("P")
    saved.putpalette(list(range(256)) * 3)
    saved.save(place)
    builder("voc_segmentation")(str(stand_in("voc_segmentation")))
