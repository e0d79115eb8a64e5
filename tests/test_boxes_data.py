"""Bad boxes and unusual folders: named, counted, said; never guessed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import box_files
from diffkd.data.boxes import build
from diffkd.errors import UserError

COUNTS = {"train": 6, "test": 3}


def coco(root, change=None, **options):
    """COCO stand-in data whose training file was changed."""
    box_files.coco(root, COUNTS)
    if change is not None:
        content = json.loads((root / "train.json").read_text())
        change(content)
        (root / "train.json").write_text(json.dumps(content))
    return build(str(root), size=64, flip=False, **options)


def said(data):
    return "\n".join(data.notes)


def error(root, change=None, **options):
    with pytest.raises(UserError) as caught:
        coco(root, change, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- boxes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([5, 5, 0, 10], "1 boxes without area left out, the first in '0.png'"),
        ([5, 5, -3, 10], "without area left out"),
        ([200, 5, 10, 10], "1 boxes outside of their picture left out"),
        ([None, 5, 10, 10], "1 boxes that are not numbers left out"),
        ([float("nan"), 5, 10, 10], "that are not numbers left out"),
        ([50, 50, 40, 5], "1 boxes cut at the border"),
    ],
)
def test_boxes_that_cannot_be_are_counted(box, words, tmp_path):
    data = coco(tmp_path, lambda c: c["annotations"][0].update(bbox=box))
    assert words in said(data)
    kept = 2 if "cut" in words else 1
    assert len(data.train[0][1]["boxes"]) == kept


def test_tiny_boxes_do_not_vanish(tmp_path):
    data = coco(tmp_path, lambda c: c["annotations"][0].update(bbox=[3.2, 4.1, 0.7, 0.4]))
    assert data.train[0][1]["boxes"][0].tolist() == pytest.approx([3.2, 4.1, 3.9, 4.5], abs=1e-4)


def test_corners_where_width_and_height_belong(tmp_path):
    def corners(content):
        for a in content["annotations"]:
            x, y, w, h = a["bbox"]
            a["bbox"] = [x + 20, y + 20, x + 20 + w, y + 20 + h]

    assert "leave their picture" in error(tmp_path, corners)
    assert "another format" in error(tmp_path, corners)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(categories=[]), "categories need an id each"),
        (lambda c: c.pop("categories"), "has no list 'categories'"),
        (lambda c: c["annotations"][0].update(category_id=99), "a box has category 99"),
        (lambda c: c["images"][1].update(id=c["images"][0]["id"]), "two pictures have the id '100'"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "1 of 6 pictures are not in"),
        (
            lambda c: [i.update(file_name=f"x{i['id']}.png") for i in c["images"]],
            "annotations of another data set",
        ),
        (lambda c: [a.update(image_id=9) for a in c["annotations"]], "come from two data sets"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "not four numbers"),
        (lambda c: c["annotations"][0].pop("bbox"), "not COCO instances with 'bbox'"),
        (lambda c: c.update(annotations=[]), "not one box to train on"),
        (lambda c: c.update(annotations=[5]), "'annotations' holds 5, where records belong"),
        (lambda c: c.update(images=["a.png"]), "'images' holds 'a.png', where records belong"),
        (lambda c: c["images"][0].pop("id"), "a record with the id None"),
        (lambda c: c["images"][0].update(width="wide"), "the record 100 has the width 'wide', no number"),
        (lambda c: c["annotations"][0].update(image_id=[1]), "a record with the image_id [1]"),
        (lambda c: c["annotations"][0].update(bbox=["a", 1, 2, 3]), "has the bbox 'a', no number"),
    ],
)
def test_files_that_do_not_fit_together(change, words, tmp_path):
    assert words in error(tmp_path, change)


def test_strays_and_doubles_are_counted(tmp_path):
    def change(content):
        content["annotations"][0]["image_id"] = 9
        content["annotations"][1]["id"] = content["annotations"][2]["id"]

        content["images"][5]["file_name"] = "4.png"
        content["categories"].append({"id": 9, "name": "bright"})

    words = said(coco(tmp_path, change))
    assert "1 pictures are listed more than once" in words
    assert "several classes are called 'bright'" in words
    assert "1 boxes of pictures that it does not list left out" in words
    assert "1 annotations have the id of another" in words


def test_crowds_are_not_trained_on_and_ignored_in_the_test(tmp_path):
    def crowd(content):
        content["annotations"][0]["iscrowd"] = 1

    data = coco(tmp_path, crowd)
    assert len(data.train[0][1]["boxes"]) == 1
    content = json.loads((tmp_path / "test.json").read_text())
    crowd(content)
    (tmp_path / "test.json").write_text(json.dumps(content))
    assert build(str(tmp_path), size=64).test[0][1]["ignore"].tolist() == [True, False]


def test_classes_that_differ_between_splits(tmp_path):
    box_files.coco(tmp_path, COUNTS)
    place = tmp_path / "test.json"
    place.write_text(place.read_text().replace('"bright"', '"dazzling"'))
    with pytest.raises(UserError, match="it has also 'dazzling'"):
        build(str(tmp_path))


def test_files_beside_the_instances_are_not_taken(tmp_path):
    box_files.coco(tmp_path, COUNTS)
    for name in ("person_keypoints_train.json", "captions_train.json", "panoptic_train.json"):
        (tmp_path / name).write_text('{"images": [], "annotations": [], "categories": []}')
    (tmp_path / "train_text.json").write_text('{"images": [], "annotations": [{"caption": "a"}]}')
    (tmp_path / "train_parts.json").write_text('{"annotations": [{"segments_info": [{"bbox": []}]}]}')
    (tmp_path / "all.json").write_bytes((tmp_path / "train.json").read_bytes())
    data = build(str(tmp_path), size=64)
    assert "COCO JSON ('all.json', 'test.json', 'train.json'): 'all.json' is of no split" in said(data)


# --- pictures --------------------------------------------------------------------------------------


def test_pictures_without_boxes_stay(tmp_path):
    data = coco(tmp_path, lambda c: c.update(annotations=c["annotations"][2:]))
    assert "1 pictures without any (negatives)" in said(data)
    assert len(data.train) == 6
    assert data.train[0][1]["boxes"].shape == (0, 4)


def test_a_picture_on_both_sides_is_warned_of(tmp_path):
    box_files.coco(tmp_path, COUNTS)
    (tmp_path / "test/0.png").write_bytes((tmp_path / "train/4.png").read_bytes())
    found = said(build(str(tmp_path)))
    assert "warning: 1 of 3 test pictures looked at are training pictures too" in found
    assert f"'{tmp_path}/test/0.png' and '{tmp_path}/train/4.png'" in found


def test_grey_and_oddly_turned_pictures(tmp_path):
    box_files.coco(tmp_path, COUNTS)
    Image.open(tmp_path / "train/0.png").convert("L").save(tmp_path / "train/0.png")
    turned = Image.open(tmp_path / "train/1.png")
    exif = turned.getexif()
    exif[0x0112] = 77  # an orientation that there is not
    turned.save(tmp_path / "train/1.png", exif=exif)
    data = build(str(tmp_path), size=64)
    assert data.train[0][0].shape == data.train[1][0].shape == (3, 64, 64)


def test_a_picture_of_another_size_than_said(tmp_path):
    data = coco(tmp_path, lambda c: c["images"][0].update(width=65))
    with pytest.raises(UserError, match="64x64 pixels, its annotations say 64x65"):
        data.train[0]


# --- layouts ---------------------------------------------------------------------------------------


def test_voc_under_other_names_held_out(tmp_path):
    box_files.voc(tmp_path, COUNTS)
    (tmp_path / "Annotations").rename(tmp_path / "annots")
    (tmp_path / "JPEGImages").rename(tmp_path / "images")
    for place in (tmp_path / "ImageSets/Main").iterdir():
        place.unlink()
    data = build(str(tmp_path), val_fraction=0.3)
    assert "VOC XML ('annots', pictures in 'images')" in said(data)
    assert "no test split: 3 of 9 pictures held out" in said(data)
    assert (len(data.train), len(data.test)) == (6, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotation><object></annotation>", "cannot read annotation"),
        ("<annotation><object><bndbox/></object></annotation>", "without a name"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "entities of its own"),
    ],
)
def test_damaged_xml_is_named(text, words, tmp_path):
    box_files.voc(tmp_path, COUNTS)
    (tmp_path / "Annotations/train2.xml").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        build(str(tmp_path))
    assert "train2.xml" in str(caught.value)


def test_yolo_without_a_description(tmp_path):
    box_files.yolo(tmp_path, COUNTS, description=False)
    (tmp_path / "labels/train/1.txt").unlink()
    (tmp_path / "labels/train/lonely.txt").write_text("0 0.5 0.5 0.1 0.1")
    (tmp_path / "labels/train/2.txt").write_text("1 0.1 0.1 0.5 0.1 0.5 0.4 0.1 0.4\n")
    data = build(str(tmp_path), size=64, flip=False)
    words = said(data)
    assert "1 pictures have no text file and count as negatives" in words
    assert "1 text files without a picture left out, such as 'lonely.txt'" in words
    assert "1 polygons" in words
    assert data.class_names == ("0", "1")
    assert data.train[2][1]["boxes"][0].tolist() == pytest.approx([6.4, 6.4, 32, 25.6], abs=1e-3)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 320 240 50 60", "are these pixels"),
        ("0 0.5 0.5 0.1", "a line is a class and centre"),
        ("cat 0.5 0.5 0.1 0.1", "is no class and numbers"),
        ("7 0.5 0.5 0.1 0.1", "class 7, but there are 2 class names"),
        ("0.7 0.5 0.5 0.1 0.1", "is no class and numbers"),
        ("inf 0.5 0.5 0.1 0.1", "is no class and numbers"),
        ("-1 0.5 0.5 0.1 0.1", "class -1; classes count from 0"),
        ("\xff\xfe", "cannot read labels"),
    ],
)
def test_lines_of_text_that_cannot_be(line, words, tmp_path):
    box_files.yolo(tmp_path, COUNTS)
    (tmp_path / "labels/train/0.txt").write_bytes(line.encode("latin-1"))
    with pytest.raises(UserError, match=words):
        build(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: images/train\nnames: {'0': a, 1: b}", None),
        ("train: [images/train, images/test]\nnames: [a, b]", None),
        ("names: [a, b]", None),
        ("train: list.txt\nnames: [a, b]", "1 of 2 pictures are not in"),
        ("train: {a: b}\nnames: [a, b]", "train must be a folder, a file of paths, or a list of such"),
        ("train: images/train\nnames: {0: a, 2: b}", "from 0 without gaps"),
        ("train: images/train\nnames: ab", "names must be a list"),
        ("train: images/train\nnames:", "names must be a list"),
    ],
)
def test_descriptions_of_yolo(text, words, tmp_path):
    box_files.yolo(tmp_path, COUNTS)
    (tmp_path / "list.txt").write_text("images/train/0.png\nimages/train/gone.png\n")
    (tmp_path / "data.yaml").write_text(f"path: ../datasets/cells\nval: images/test\n{text}\n")
    if words is None:
        data = build(str(tmp_path), size=64)
        assert len(data.train) == (9 if "[images" in text else 6)
        assert data.class_names == ("a", "b")
        return
    with pytest.raises(UserError, match=words):
        build(str(tmp_path))


def test_pictures_of_one_name_are_said(tmp_path):
    box_files.voc(tmp_path, COUNTS)
    (tmp_path / "JPEGImages/train1.jpg").write_bytes((tmp_path / "JPEGImages/train1.png").read_bytes())
    assert "of one name, of which the last is taken: 'train1.jpg'" in said(build(str(tmp_path)))


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="neither COCO JSON, nor VOC XML, nor YOLO"):
        build(str(tmp_path))
    with pytest.raises(UserError, match="no VOC XML"):
        build(str(box_files.coco(tmp_path, COUNTS)), format="voc")


# --- views -----------------------------------------------------------------------------------------

_VIEWS = {
    "flip": {"flip": True},
    "jitter": {"min_scale": 0.5, "max_scale": 1.5},
    "sizes": {"train_sizes": [48, 64]},
    "colours": {"photometric": True},
    "crop": {"iou_crop": True},
    "mosaic": {"mosaic": 1.0},
}


@pytest.mark.parametrize("name", _VIEWS)
def test_boxes_follow_their_picture(name, tmp_path):
    """Whatever is done, what lies in the middle of a box is brighter than the ground."""
    box_files.coco(tmp_path, COUNTS)
    data = build(str(tmp_path), **{"size": 64, "flip": False, **_VIEWS[name]})
    for i in range(len(data.train)):
        torch.manual_seed(i)
        image, target = data.train[i]
        height, width = image.shape[-2:]
        for left, top, right, bottom in target["boxes"].tolist():
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            middle = image.float().mean(0)[int((top + bottom) / 2), int((left + right) / 2)]
            assert middle > 45 + (0 if name == "colours" else 15)


def test_views_are_repeated_by_their_seed(tmp_path):
    box_files.coco(tmp_path, COUNTS)
    data = build(str(tmp_path), size=64, photometric=True, iou_crop=True, mosaic=0.5)
    views = []
    for _ in range(2):
        torch.manual_seed(3)
        np.random.seed(3)
        views.append(data.train[2])
    assert torch.equal(views[0][0], views[1][0])
    assert torch.equal(views[0][1]["boxes"], views[1][1]["boxes"])


def test_wide_and_high_pictures_come_in_batches_of_their_own(tmp_path):
    from diffkd.data.base import Loader

    def mixed(content):
        for i, image in enumerate(content["images"]):
            image["height"] = 40 if i % 2 else 64
            Image.open(tmp_path / f"train/{i}.png").crop((0, 0, 64, image["height"])).save(
                tmp_path / f"train/{i}.png"
            )
            image["width"] = 64 if i % 2 else 60
            if not i % 2:
                Image.open(tmp_path / f"train/{i}.png").crop((0, 0, 60, 64)).save(tmp_path / f"train/{i}.png")

    data = coco(tmp_path, mixed)
    loader = Loader(data.train, 3, shuffle=True, collate=data.collate)
    for epoch in range(3):
        batches = [batch.indices % 2 for batch in loader.epoch(epoch)]
        assert all(len(kinds.unique()) == 1 for kinds in batches)
        assert len(batches) == 2
