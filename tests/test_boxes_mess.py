"""Box files as people have them: other names of splits, other spellings, shares where pixels belong."""

import json
import os
import shutil

import pytest

import box_files
from diffkd.data.boxes import build
from diffkd.errors import UserError

COUNTS = {"train": 4, "test": 2}


def told(data, *words):
    return any(all(word in note for word in words) for note in data.notes)


def moved(root, *pairs):
    for old, new in pairs:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(root / old, root / new)
    return root


def sizes(root, **options):
    data = build(str(root), size=64, **options)
    return len(data.train), len(data.test), data.class_names


def yolo(root, line="0 0.5 0.5 0.4 0.4", names=("train", "val")):
    for name in names:
        for i in range(3):
            box_files.picture(root / "images" / name / f"{i}.png", i + 10 * len(name))
            place = root / "labels" / name / f"{i}.txt"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(line)
    return root


def voc(root, name, objects=True, annotations="Annotations", pictures="JPEGImages", space=""):
    box = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>21</ymax></bndbox>"
    object_ = f"<object><name>cat</name>{box if objects else ''}</object>"
    for i in range(3):
        box_files.picture(root / pictures.format(name) / f"{i}.png", i + 10 * len(name))
        place = root / annotations.format(name) / f"{i}.xml"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"<annotation{space}>{object_}</annotation>")
    return root


def test_splits_go_by_other_names_in_every_format(tmp_path):
    coco = box_files.coco(tmp_path / "coco" / "around", COUNTS)
    moved(coco, ("train", "Training"), ("train.json", "Training.json"), ("test.json", "Test.json"))
    moved(coco, ("test", "Test"))
    assert sizes(tmp_path / "coco") == (4, 2, ("bright", "dim"))
    for names in (("training", "validation"), ("Train", "Valid")):
        root = tmp_path / names[0]
        assert sizes(yolo(root, names=names)) == (3, 3, ("0",))
        for name in names:
            moved(root, (f"images/{name}", f"{name}/images"), (f"labels/{name}", f"{name}/labels"))
        assert sizes(root) == (3, 3, ("0",))
        for i, layout in enumerate((("{}/Annotations", "{}/JPEGImages"), ("annotations/{}", "images/{}"))):
            place = tmp_path / f"voc{i}{names[0]}"
            for name in names:
                voc(place, name, annotations=layout[0], pictures=layout[1])
            assert sizes(place) == (3, 3, ("cat",))


def test_ids_are_the_same_however_they_are_written(tmp_path):
    box_files.coco(tmp_path, COUNTS)
    whole = build(str(tmp_path), size=64).train.annotated
    content = json.loads((tmp_path / "train.json").read_text())
    for box in content["annotations"]:
        box |= {"image_id": str(box["image_id"]), "category_id": float(box["category_id"])}
    (tmp_path / "train.json").write_text(json.dumps(content))
    again = build(str(tmp_path), size=64).train.annotated
    assert (again.boxes == whole.boxes).all()
    assert (again.labels == whole.labels).all()


def test_shares_in_the_place_of_pixels_are_refused(tmp_path):
    box_files.coco(tmp_path, COUNTS)
    content = json.loads((tmp_path / "train.json").read_text())
    for box in content["annotations"]:
        box["bbox"] = [value / 64 for value in box["bbox"]]
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no box leaves the first pixel: are these shares"):
        build(str(tmp_path))


def test_names_are_text_and_classes_without_a_box_are_said(tmp_path):
    yolo(tmp_path, "2 0.5 0.5 0.4 0.4")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [no, 1.50, Cat, cat]\n")
    data = build(str(tmp_path), size=64)
    assert data.class_names == ("no", "1.50", "Cat", "cat")
    assert told(data, "no box to train on is of class 'no', '1.50', 'cat'")
    assert told(data, "'Cat' and 'cat' differ in capitals alone")
    (tmp_path / "train.txt").write_text("".join(f"C:\\x\\images\\train\\{i}.png\n" for i in range(2)))
    text = (tmp_path / "data.yaml").read_text().replace("train: images/train", "train: train.txt")
    (tmp_path / "data.yaml").write_text(text)
    assert sizes(tmp_path)[:2] == (2, 3)
    (tmp_path / "data.yaml").write_text("train: images\nnames: [2026-11-31]")
    with pytest.raises(UserError, match=r"cannot read .*data\.yaml"):
        build(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("1000000000 0.5 0.5 0.4 0.4", "class 1000000000"),
        ("0,0.5,0.5,0.4,0.4", "is no class and numbers"),
        ("cat 0.5 0.5 0.4 0.4", "is no class and numbers"),
        ("0 nan 0.5 0.4 0.4", "3 boxes that are not numbers left out"),
    ],
)
def test_lines_that_are_no_boxes_are_named(tmp_path, line, words):
    with pytest.raises(UserError, match=words):
        build(str(yolo(tmp_path, line)))


def test_keypoints_of_yolo_are_no_polygons(tmp_path):
    line = "0 0.5 0.5 0.4 0.4 0.6 0.6 0 0 0.4 0.5 0.7 0.7"
    yolo(tmp_path, line)
    assert told(build(str(tmp_path)), "3 polygons", "if they are boxes with keypoints", "needs kpt_shape")
    (tmp_path / "data.yaml").write_text(
        "train: images/train\nval: images/val\nnames: [a]\nkpt_shape: [4, 2]\n"
    )
    data = build(str(tmp_path))
    assert not told(data, "polygons")
    assert data.test[0][1]["boxes"][0].tolist() == pytest.approx([19.2, 19.2, 44.8, 44.8])
    yolo(tmp_path, line + " 0.1")
    with pytest.raises(UserError, match=r"14 words; .* kpt_shape: \[NUMBER, 2 or 3\]"):
        build(str(tmp_path))
    yolo(tmp_path, "0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5")
    (tmp_path / "data.yaml").unlink()
    assert not told(build(str(tmp_path)), "keypoints")


def test_text_in_utf16_is_read_and_what_is_no_file_is_not_waited_for(tmp_path):
    root = box_files.coco(tmp_path / "coco", COUNTS)
    (root / "test.json").write_text((root / "test.json").read_text(), "utf-16")
    assert sizes(root)[:2] == (4, 2)
    os.mkfifo(root / "val.json")
    assert told(build(str(root)), "'val.json' is none, and left out")
    content = json.loads((root / "train.json").read_text())
    content["annotations"][0]["bbox"][2] = 10**400
    (root / "train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"bbox 10{50,}, no number"):
        build(str(root))
    root = box_files.voc(tmp_path / "voc", COUNTS)
    (root / "ImageSets/Main/test.txt").write_text("test0\n", "utf-8-sig")
    assert len(build(str(root)).test) == 1
    for name in ("voc/Annotations/test0.xml", "yolo/labels/test/0.txt", "other/data.yaml"):
        root = tmp_path / name.partition("/")[0]
        root.exists() or box_files.yolo(root, COUNTS)
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"cannot read .*{name}': it is not a regular file"):
            build(str(root))


def test_objects_in_a_namespace_count_and_those_without_a_box_are_said(tmp_path):
    assert sizes(voc(tmp_path / "a", "", space=' xmlns="http://x/y"'))[2] == ("cat",)
    with pytest.raises(UserError, match=r"not one box to train on .*3 boxes that are not numbers left out"):
        build(str(voc(tmp_path / "b", "", objects=False)))
