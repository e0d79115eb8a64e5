"""Pictures, masks and tables of classes as people have them: damaged, negative, written by other programs."""

import numpy as np
import pytest
from PIL import Image

from diffkd.data.base import builder
from diffkd.errors import UserError
from diffkd.pictures.tables import colour_code, read_table
from mask_cases import street

build = builder("masks")


def test_unreadable_pictures_are_named_skipped_and_shown_beforehand(tmp_path):
    root = street(tmp_path)
    place = root / "images" / "train" / "1.jpg"
    place.write_bytes(place.read_bytes()[:-300])
    data = build(str(root), max_corrupt=1)
    assert data.train.unreadable() == []
    assert "1.jpg': image file is truncated" in data.train.unreadable(decoded=True)[0]
    with pytest.warns(UserWarning, match=r"1\.jpg.*skipped \(1 of at most 1\)"):
        assert len(data.train[1]) == 2
    with pytest.raises(UserError, match=r"data\.max_corrupt=1"):
        _ = build(str(root)).train[1]


def test_a_picture_that_is_none_is_put_up_with_on_request(tmp_path):
    root = street(tmp_path)
    for name, content in (("1", b"no picture"), ("2", None)):
        place = root / "images" / "train" / f"{name}.jpg"
        Image.open(place).save(place.with_suffix(".png"))
        place.unlink()
        whole = place.with_suffix(".png").read_bytes()
        place.with_suffix(".png").write_bytes(content or whole[:-200])
    with pytest.raises(UserError, match=r"1\.png': it is no picture"):
        build(str(root))
    lines = build(str(root), max_corrupt=2).train.unreadable(decoded=True)
    assert [line.split("'")[1][-5:] for line in lines] == ["1.png", "2.png"]


def test_indices_that_mean_several_colours_are_refused(tmp_path):
    root, colours = street(tmp_path), [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255]
    for shift, place in enumerate(sorted((root / "masks").glob("*/*.png"))):
        classes = np.minimum(np.asarray(Image.open(place)), 3)
        mask = Image.fromarray((classes + shift) % 4, "P")
        mask.putpalette(np.roll(colours, 3 * shift).tolist())
        mask.save(place)
    with pytest.raises(
        UserError, match=r"index \d of their palettes is \(.*\) in mask '.*' and \(.*red green blue"
    ):
        build(str(root))
    (root / "classes.txt").write_text("0 0 0 road\n255 0 0 kerb\n0 255 0 car\n0 0 255 void\n")
    assert {int(v) for _, mask in build(str(root)).test for v in mask.unique()} == {0, 1, 2, 255}


def test_greys_of_a_palette_that_are_not_its_indices_are_said(tmp_path):
    root = street(tmp_path)
    for place in (root / "masks").glob("*/*.png"):
        Image.open(place).save(place.with_suffix(".gif"))
        place.unlink()
    assert any("3 of '" in n and "' is grey 255: where colours say" in n for n in build(str(root)).notes)


def test_a_table_of_classes_that_has_no_end_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="'/dev/zero' cannot be read as a list of classes: it is not a regular"
    ):
        build(str(street(tmp_path)), classes="/dev/zero")


def test_masks_that_begin_at_one_are_told_how_to_count(tmp_path):
    root = street(tmp_path)
    for place in (root / "masks").glob("*/*.png"):
        values = np.asarray(Image.open(place))
        Image.fromarray(np.where(values == 255, 255, values + 1).astype(np.uint8)).save(place)
    assert any("data.classes=[void,NAME,...] counts" in note for note in build(str(root)).notes)
    with pytest.raises(UserError, match=r"holds the value 3 .* put void first among the names"):
        build(str(root), classes=["road", "kerb", "car"])
    data = build(str(root), classes=["void", "road", "kerb", "car"])
    assert {int(v) for _, mask in data.test for v in mask.unique()} == {0, 1, 2, 255}
    for size in (10**9, [64, 10**6]):
        with pytest.raises(UserError, match=r"crop_size=.*needs at most 16384 pixels"):
            build(str(root), crop_size=size)


def test_masks_of_negative_values_are_named(tmp_path):
    root = street(tmp_path)
    (root / "masks" / "train" / "1.png").unlink()
    Image.fromarray(np.full((32, 48), -1, np.int32)).save(root / "masks" / "train" / "1.tif")
    with pytest.raises(UserError, match=r"1\.tif' holds the value -1"):
        build(str(root))


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("0: road\n1: kerb", {0: 0, 1: 1}),
        ("1=road\n2=kerb", {1: 0, 2: 1}),
        ("- road\n- kerb", None),
        ('["road", "kerb"]', None),
        ('{"1": "road", "2": "kerb"}', {1: 0, 2: 1}),
        ('{"road": 1, "kerb": 2}', {1: 0, 2: 1}),
        ('[{"name": "road", "color": [1, 2, 3]}, {"name": "kerb", "color": [3, 2, 1]}]', "colours"),
        ("# label:color_rgb:parts:actions\nroad:1,2,3::\nkerb:3,2,1::", "colours"),
        ("#010203 road\n#030201 kerb", "colours"),
        ("road 1 2 3\nkerb 3 2 1", "colours"),
        ("(1, 2, 3): road\n(3, 2, 1): kerb", "colours"),
    ],
)
def test_class_tables_of_other_programs(text, codes, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    if codes == "colours":
        codes = {colour_code(1, 2, 3): 0, colour_code(3, 2, 1): 1}
    assert read_table(tmp_path / "classes.txt") == (("road", "kerb"), codes)
