"""Pictures and masks in folders: what the values mean is said, every mistake names its file."""

import os
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.data.base import builder
from diffkd.errors import UserError
from diffkd.pictures import count as counting
from diffkd.pictures.masks import MaskFiles
from diffkd.pictures.tables import read_table
from diffkd.pictures.twins import shared_pictures
from mask_cases import save, scene, street

build = builder("masks")
GREY = np.arange(32 * 48, dtype=np.uint8).reshape(32, 48)


def noted(data):
    return "; ".join(data.notes)


def replaced(root, mask, name="masks/train/0.png"):
    save(root / name, mask)
    return root


def a_mask(value=1, pixels=7, kind=np.uint8, shape=(32, 48)):
    mask = np.zeros(shape, kind)
    mask.ravel()[:pixels] = value
    return mask


# --- what masks may be -----------------------------------------------------------------------------


def test_pairs_classes_and_shares(tmp_path):
    root = street(tmp_path)
    (root / "classes.txt").write_text("road\nkerb\ncar\n")
    data = build(str(root))
    assert data.class_names == ("road", "kerb", "car")
    assert (len(data.train), len(data.test), data.num_classes) == (6, 6, 3)
    assert "classes as" in noted(data)
    assert "255 = void 0.33 %" in noted(data)
    image, mask = data.test[0]
    assert image.shape == (3, 32, 48)
    assert mask.dtype == torch.int64
    expected = np.asarray(Image.open(root / "masks/val/0.png"))
    assert np.array_equal(mask.numpy(), expected)
    torch.manual_seed(0)
    image, mask = data.train[0]
    assert image.shape[1:] == mask.shape == (32, 48)


@pytest.mark.parametrize("form", ["8 bits", "16 bits", "palette", "grey as colour"])
def test_forms_of_grey_masks(form, tmp_path):
    root, mask = street(tmp_path), a_mask(2)
    saved = Image.fromarray(mask)
    if form == "16 bits":
        saved = Image.fromarray(mask.astype(np.uint16))
    elif form == "palette":
        saved = saved.convert("P")
        saved.putpalette([200, 10, 10, 0, 0, 0, 7, 7, 7])
    elif form == "grey as colour":
        saved = saved.convert("RGB")
    saved.save(root / "masks/val/3.png")
    assert np.array_equal(build(str(root)).test[3][1].numpy(), mask)


def test_coloured_masks_with_a_table(tmp_path):
    root, colours = street(tmp_path), np.array([[0, 0, 0], [128, 64, 0], [0, 0, 200], [9, 9, 9]], np.uint8)
    for split in ("train", "val"):
        for i in range(6):
            labels = a_mask(i % 4, 50)
            save(root / f"masks/{split}/{i}.png", colours[labels])
    table = root / "table.csv"
    table.write_text("name,r,g,b\nvoid,0,0,0\nroad,128,64,0\nsky,0,0,200\nroad,9,9,9\n")
    data = build(str(root), classes=str(table))
    assert data.class_names == ("road", "sky")
    assert data.test[3][1].unique().tolist() == [0, 255]
    assert "(128, 64, 0)/(9, 9, 9) = road" in noted(data)


def test_values_with_gaps(tmp_path):
    root = street(tmp_path, classes=2)
    for i in range(6):
        replaced(root, a_mask(700, kind=np.uint16), f"masks/train/{i}.png")
        replaced(root, a_mask(700, kind=np.uint16), f"masks/val/{i}.png")
    (root / "classes.txt").write_text("# mine\n0 ground\n700 lesion\n")
    data = build(str(root))
    assert data.num_classes == 2
    assert data.test[0][1].unique().tolist() == [0, 1]


def test_without_names_the_values_are_the_classes(tmp_path):
    root = street(tmp_path, classes=2)
    data = build(str(replaced(root, a_mask(4))))
    assert data.class_names == ("0", "1", "2", "3", "4")
    assert "no mask holds the value 2, 3" in noted(data)
    assert "only the training masks show '4'" in noted(data)


def test_a_class_that_only_the_test_has_is_said(tmp_path):
    data = build(str(replaced(street(tmp_path, classes=2), a_mask(2), "masks/val/0.png")))
    assert "only the test masks show '2'" in noted(data)


def test_binary_masks(tmp_path):
    root = street(tmp_path)
    for split in ("train", "val"):
        for i in range(6):
            replaced(root, a_mask(255), f"masks/{split}/{i}.png")
    with pytest.raises(UserError, match=r"0 and 255 alone; name both: data.classes=\[background,object\]"):
        build(str(root))
    data = build(str(root), classes=["ground", "lesion"])
    assert data.test[0][1].unique().tolist() == [0, 1]
    assert "255 is 'lesion', nothing is void" in noted(data)
    (root / "table.txt").write_text("0 ground\n255 lesion\n")
    data = build(str(root), classes=str(root / "table.txt"))
    assert data.test[0][1].sum() == 7
    assert "the value 255 is the class 'lesion', not void" in noted(data)


def test_a_picture_that_lies_on_its_side_has_an_upright_mask(tmp_path):
    root = street(tmp_path)
    picture, mask = scene(np.random.default_rng(1), size=(48, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(np.rot90(picture))
    lying.save(root / "images/val/0.jpg", exif=exif)
    save(root / "masks/val/0.png", mask)
    image, found = build(str(root)).test[0]
    assert image.shape == (3, 48, 32)
    assert found.shape == (48, 32)


def test_names_with_a_suffix_and_held_out_pictures(tmp_path):
    root = street(tmp_path, splits=("",), count=10)
    for place in sorted((root / "masks").iterdir()):
        place.rename(place.with_name(f"{place.stem}_L.png"))
    with pytest.raises(UserError, match=r"no mask has the name of its picture.*mask_suffix"):
        build(str(root))
    data = build(str(root), mask_suffix="_L", val_fraction=0.3)
    assert (len(data.train), len(data.test)) == (7, 3)
    assert "3 of its 10 pictures held out" in noted(data)


# --- what is refused -------------------------------------------------------------------------------


def lossy(root, form="JPEG", **how):
    Image.fromarray(a_mask()).convert("RGB").save(root / "masks/train/0.png", form, **how)


def everywhere(root, value, split="*", kind=np.uint8):
    for place in (root / "masks").glob(f"{split}/*"):
        save(place, a_mask(value, 50, kind=kind))


def fifo(place):
    place.unlink()
    os.mkfifo(place)


WRONG = {
    "no mask in .* for '.*train/0.jpg'": lambda root: (root / "masks/train/0.png").unlink(),
    "no picture in .* for the mask '.*val/2.png'": lambda root: (root / "images/val/2.jpg").unlink(),
    "have one name": lambda root: save(root / "images/val/2.png", GREY),
    "has 32x48 pixels, its mask '.*train/0.png' 30x48": lambda root: replaced(root, GREY[:30] % 3),
    "train/0.png' is a JPEG, which invents colours": lossy,
    "train/0.png' is a lossy WebP, which": lambda root: lossy(root, "WEBP"),
    "train/0.png' is a TIFF with JPEG inside": lambda root: lossy(root, "TIFF", compression="jpeg"),
    "train/0.png' holds the value 13 in 7 pixels": lambda root: replaced(root, a_mask(13)),
    r"train/0.png' is coloured \(\(1, 2, 3\) in": lambda root: replaced(
        root, np.full((32, 48, 3), (1, 2, 3), np.uint8)
    ),
    "cannot read mask '.*train/0.png'": lambda root: (root / "masks/train/0.png").write_bytes(b"\x89PNG\r\n"),
    "train/0.png': it is empty": lambda root: (root / "masks/train/0.png").write_bytes(b""),
    "no mask in .* for '.*train/0.jpg' .*1 not regular files": lambda root: fifo(root / "masks/train/0.png"),
    "cannot read picture '.*train/0.jpg'": lambda root: (root / "images/train/0.jpg").write_bytes(b"no"),
    "no folder 'val' in '.*masks'": lambda root: (root / "masks/val").rename(root / "masks/other"),
    "has a folder 'train' but none of 'val'": lambda root: (root / "images/val").rename(root / "images/my"),
}


@pytest.mark.parametrize("says", WRONG)
def test_mistakes_name_the_file(says, tmp_path):
    root = street(tmp_path)
    WRONG[says](root)
    with pytest.raises(UserError, match=says) as error:
        build(str(root), classes=["road", "kerb", "car"])
    assert "\n" not in str(error.value)


def test_coloured_masks_want_a_table(tmp_path):
    root = replaced(street(tmp_path), np.full((32, 48, 3), (1, 2, 3), np.uint8))
    with pytest.raises(UserError, match=r"coloured .*\(1, 2, 3\).*one 'red green blue name' a line"):
        build(str(root))
    (root / "classes.txt").write_text("0 0 0 ground\n1 1 1 road\n255 255 255 void\n")
    with pytest.raises(UserError, match=r"the colour \((2, 2, 2|1, 2, 3)\) in \d+ pixels, .* none of the 2"):
        build(str(root))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no classes"),
        ("0 road\nkerb\n", "every line needs"),
        ("0 road\n0 kerb\n", "names 0 twice"),
        ("300 0 0 road\n0 0 0 kerb", "'300 0 0 road' has no name, or no colour"),
        ("1 2 road\n3 4 kerb", "every line needs"),
        ("-1 road\n0 kerb\n1 car\n", "'-1 road' has a negative value"),
    ],
)
def test_class_tables_that_say_nothing(text, says, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=says):
        read_table(tmp_path / "classes.txt")


def test_class_tables_as_people_write_them(tmp_path):
    place = tmp_path / "classes.txt"
    for text, found in {
        "0;road\n1;kerb of stone\n": (("road", "kerb of stone"), {0: 0, 1: 1}),
        "0\troad\n7\tkerb\n": (("road", "kerb"), {0: 0, 7: 1}),
        "void\nroad\nkerb\nroad\n": (("road", "kerb"), {0: 255, 1: 0, 2: 1, 3: 0}),
    }.items():
        place.write_text(text)
        assert read_table(place) == found
    place.write_bytes("stra\u00dfe\nkerb\n".encode("latin-1"))
    with pytest.raises(UserError, match="list of classes: save it as UTF-8 text"):
        read_table(place)
    data = build(str(street(tmp_path / "street")), classes=["road", "car", "road"])
    assert data.class_names == ("road", "car")
    assert "0/2 = road" in noted(data)


def test_pictures_of_12_bits_are_not_black(tmp_path):
    root = street(tmp_path)
    for place in (root / "images").glob("*/*.jpg"):
        grey = np.asarray(Image.open(place).convert("L")).astype(np.uint16) * 16
        save(place.with_suffix(".png"), grey)
        place.unlink()
    data = build(str(root))
    assert "16-bit pictures: values" in noted(data)
    assert data.test[0][0].float().mean() > 60


def test_one_class_is_too_few(tmp_path):
    root = street(tmp_path)
    with pytest.raises(UserError, match="needs 2 at least"):
        build(str(root), classes=["road"])
    everywhere(root, 255)
    with pytest.raises(UserError, match=r"training masks show 'a' alone: .*0 = a 96.7 %, .* void 3.3 %"):
        build(str(root), classes=["a", "b", "c"])


def test_all_void_pictures_count_nothing(tmp_path):
    root = replaced(street(tmp_path, classes=3), np.full((32, 48), 255, np.uint8))
    assert (build(str(root)).train[0][1] == 255).all()
    for place in (root / "masks/val").iterdir():
        save(place, np.full((32, 48), 255, np.uint8))
    with pytest.raises(UserError, match=r"every pixel of the test masks is void: .*255 = void 100 %"):
        build(str(root))


def test_values_with_many_gaps_want_names(tmp_path):
    root = street(tmp_path)
    everywhere(root, 100, kind=np.uint16)
    with pytest.raises(UserError, match=r"values up to 100 with gaps \('0', '100'\): data.classes=FILE"):
        build(str(root))


def test_another_value_is_void(tmp_path):
    root = street(tmp_path)
    everywhere(root, 250)
    replaced(root, a_mask(1))
    data = build(str(root), ignore_index=250)
    assert data.class_names == ("0", "1")
    assert data.test[0][1].unique().tolist() == [0, 255]
    for place in (root / "masks").glob("*/*"):
        save(place, a_mask(2, 50) + a_mask(1, 20))
    data = build(str(root), ignore_index=0)
    assert data.class_names == ("1", "2", "3")
    assert data.test[0][1].unique().tolist() == [1, 2, 255]
    assert "values 0 to 3 are the classes, but for 0" in noted(data)
    with pytest.raises(UserError, match="ignore_index=0 is the value of the class 'a' too"):
        build(str(root), ignore_index=0, classes=["a", "b", "c", "d"])


def test_binary_masks_that_were_resized_are_told(tmp_path):
    root = street(tmp_path)
    everywhere(root, 255)
    replaced(root, a_mask(128))
    with pytest.raises(UserError, match=r"value 128 in 7 pixels.*masks of 0 and 255 must hold no other"):
        build(str(root), classes=["ground", "lesion"])


# --- what folders hold -----------------------------------------------------------------------------


def test_accents_blanks_and_what_is_no_picture(tmp_path):
    root = street(tmp_path)
    for kind, form, name in (("images", "NFC", "0.jpg"), ("masks", "NFD", "0.png")):
        place = root / kind / "train"
        accented = unicodedata.normalize(form, f"stra\u00dfe \u00fcber [1] {name}")
        (place / name).rename(place / accented)
        (place / "@eaDir").mkdir()
        (place / "@eaDir/0.jpg").touch()
        (place / "labels.json").touch()
    data = build(str(root))
    assert len(data.train) == 6
    said = next(note for note in data.notes if note.startswith(f"left out in '{root}/masks/train'"))
    assert "1 of the system" in said
    assert "1 .json files" in said


def test_a_picture_on_both_sides_is_warned_of(tmp_path):
    root = street(tmp_path)
    (root / "images/val/5.jpg").write_bytes((root / "images/train/2.jpg").read_bytes())
    said = "warning: 1 of 6 test pictures looked at are training pictures too, such as"
    assert f"{said} '{root}/images/val/5.jpg' and '{root}/images/train/2.jpg'" in noted(build(str(root)))


def test_bitmaps_of_one_size_are_told_apart(tmp_path):
    random = np.random.default_rng(0)
    places = [tmp_path / f"{i}.bmp" for i in range(14)]
    for place in places:
        save(place, random.integers(0, 255, (8, 8, 3)).astype(np.uint8))
    places[-1].write_bytes(places[9].read_bytes())
    sides = ((12, places.__getitem__), (2, places[12:].__getitem__))
    assert shared_pictures(*sides) == (
        "warning: 1 of 2 test pictures looked at are training pictures too, such as "
        f"'{places[-1]}' and '{places[9]}'",
    )


def test_masks_are_counted_once_and_again_where_they_changed(tmp_path, monkeypatch):
    root, read = street(tmp_path / "street"), []
    monkeypatch.setenv("DIFFKD_CACHE", str(tmp_path / "cache"))
    plain = MaskFiles.codes

    def codes(self, index):
        read.append(self.place(index))
        return plain(self, index)

    monkeypatch.setattr(MaskFiles, "codes", codes)
    first = build(str(root))
    assert (len(read), (tmp_path / "cache").exists()) == (12, False)  # not worth a file
    monkeypatch.setattr(counting, "_WORTH", -1)
    build(str(root))
    read.clear()
    assert build(str(root)).notes == first.notes
    assert not read
    replaced(root, a_mask(2, 9), "masks/val/3.png")
    again = build(str(root))
    assert read == [str(root / "masks/val/3.png")]
    assert again.notes == first.notes  # of the training masks
    read.clear()
    (root / "classes.txt").write_text("0 0 0 ground\n1 1 1 kerb\n2 2 2 car\n255 255 255 void\n")
    build(str(root))
    assert len(read) == 12  # read as colours
    for place in (tmp_path / "cache/masks").iterdir():
        place.write_bytes(b"PK")
    build(str(root))
    assert len(read) == 24
