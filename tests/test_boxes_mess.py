"""Box files as people have them: other names of splits, other spellings, shares where pixels belong."""

import json
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


def test_objects_in_a_namespace_count_and_those_without_a_box_are_said(tmp_path):
    assert sizes(voc(tmp_path / "a", "", space=' xmlns="http://x/y"'))[2] == ("cat",)
    with pytest.raises(UserError, match=r"not one box to train on .*3 boxes that are not numbers left out"):
        build(str(voc(tmp_path / "b", "", objects=False)))
