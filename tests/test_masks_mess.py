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
