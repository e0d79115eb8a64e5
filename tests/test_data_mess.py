"""Picture folders and lists as people have them: what is left out is said, nothing is doubled or guessed."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.data.base import Loader
from diffkd.errors import UserError
from diffkd.pictures.decoding import decode
from picture_cases import GREEN, RED, build, error, paint, tree


def targets(split):
    return [split[i][1] for i in range(len(split))]


def told(data, *words):
    return any(all(word in note for word in words) for note in data.notes)


# folders


def test_what_is_no_picture_is_counted_and_every_ending_of_jpeg_is_one(tmp_path):
    tree(tmp_path, count=10)
    for name in ("a.jfif", "b.JPE"):
        paint(tmp_path / "cat" / name, format="JPEG")
    for name in ("c.heic", "d.HEIC", "notes.txt", "noending"):
        (tmp_path / "cat" / name).touch()
    (tmp_path / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for name in ("__MACOSX", "$RECYCLE.BIN", "System Volume Information", "@eaDir"):
        paint(tmp_path / name / "x.png")
        paint(tmp_path / "dog" / name / "x.png")
    (tmp_path / "dog" / "Thumbs.db").touch()
    data = build(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert len(data.train) + len(data.test) == 22
    kinds = ("2 .heic files", "1 .txt files", "1 files without an ending", "1 links to nowhere")
    assert told(data, *kinds, "9 of the system")


def test_a_class_that_is_a_link_to_nowhere_is_refused(tmp_path):
    tree(tmp_path)
    (tmp_path / "emu").symlink_to(tmp_path / "nowhere")
    assert "emu' is a link to nowhere" in error(tmp_path)


def test_every_folder_is_entered_once(tmp_path):
    tree(tmp_path / "train", count=3)
    tree(tmp_path / "val", count=1)
    tree(tmp_path / "elsewhere", classes=("more",), count=2)
    (tmp_path / "train" / "cat" / "loop").symlink_to("..")
    (tmp_path / "train" / "dog" / "up").symlink_to(tmp_path)
    (tmp_path / "train" / "dog" / "loop").symlink_to(".")
    (tmp_path / "train" / "cat" / "others").symlink_to("../dog")
    (tmp_path / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "train" / "dog" / "again").symlink_to(tmp_path / "elsewhere" / "more")
    data = build(tmp_path)
    assert targets(data.train) == [0] * 5 + [1] * 3
    assert told(data, "5 links to folders that are read elsewhere")
    (tmp_path / "train" / "kitty").symlink_to("cat")
    assert "kitty' is the same folder as 'cat'" in error(tmp_path)


@pytest.mark.parametrize("device", [False, True])
def test_only_regular_files_are_opened(tmp_path, device):
    tree(tmp_path, count=10)
    if device:
        (tmp_path / "cat" / "x.jpg").symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "cat" / "x.jpg")
    assert told(build(tmp_path), "1 not regular files")
    (tmp_path / "train.csv").write_text("path,label\ncat/0.png,a\ncat/x.jpg,b\n")
    assert "row 3" in error(tmp_path, "table")
    with pytest.raises(UserError, match="not a regular file"):
        decode(tmp_path / "cat" / "x.jpg", "x")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    tree(tmp_path)
    paint(tmp_path / "dog" / "deep" / "x.png")
    whole = os.scandir

    def scandir(place):
        if str(place).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return whole(place)

    monkeypatch.setattr("os.scandir", scandir)
    assert "dog/deep': Permission denied" in error(tmp_path)


def test_a_class_without_test_pictures_is_said(tmp_path):
    tree(tmp_path / "train", classes=("cat", "dog", "emu"), colours=(RED, GREEN, RED))
    tree(tmp_path / "val", classes=("dog",))
    (tmp_path / "val" / "emu").mkdir()
    data = build(tmp_path)
    assert (data.num_classes, targets(data.test)) == (3, [1] * 4)
    assert told(data, "no test picture of classes 'cat', 'emu'")


def test_numbered_classes_are_ordered_as_wanted_and_said(tmp_path):
    names = [str(n) for n in range(1, 13)]
    tree(tmp_path, classes=names, colours=[RED] * 12)
    data = build(tmp_path)
    assert data.class_names[:4] == ("1", "10", "11", "12")
    assert told(data, "'10' is class 1", "data.class_order=natural", "'2' is")
    data = build(tmp_path, class_order="natural")
    assert data.class_names == tuple(names)
    assert data.train[0][1] == 0
    assert data.train.source.source.path(4) == "2/0.png"
    assert build(tmp_path, class_order=names[::-1]).class_names == tuple(names[::-1])
    assert "lacks '12'" in error(tmp_path, class_order=names[:-1])
    assert "has '1' too often" in error(tmp_path, class_order=[*names, "1"])


def test_one_picture_on_both_sides_is_said(tmp_path):
    for i in range(4):
        paint(tmp_path / "train" / "cat" / f"{i}.png", (i, 0, 0))
        paint(tmp_path / "val" / "cat" / f"other{i}.png", (i + 3, 0, 0))
    assert told(build(tmp_path), "1 of 4 test pictures", "val/cat/other0.png", "train/cat/3.png")


# unreadable ones


@pytest.mark.filterwarnings("ignore:cannot read")
def test_an_unreadable_test_picture_is_left_out_not_replaced(tmp_path):
    tree(tmp_path / "train")
    tree(tmp_path / "val")
    (tmp_path / "val" / "cat" / "1.png").write_bytes(b"")
    data = build(tmp_path, max_corrupt=1)
    batches = list(Loader(data.test, 3, shuffle=False).epoch())
    assert [b.indices.tolist() for b in batches] == [[0, 2], [3, 4, 5], [6, 7]]
    assert torch.cat([b.targets for b in batches]).tolist() == [0] * 3 + [1] * 4
    assert [line.split("'")[1][-9:] for line in data.test.unreadable()] == ["cat/1.png"]
    assert data.train.unreadable() == []
    with pytest.raises(UserError, match=r"max_corrupt=1"):
        list(Loader(build(tmp_path).test, 3, shuffle=False).epoch())


def test_further_frames_are_said(tmp_path):
    tree(tmp_path, count=10)
    for i in range(2):
        frames = [Image.new("L", (8, 8), level) for level in (10 * i, 200)]
        frames[0].save(tmp_path / "cat" / f"x{i}.tif", save_all=True, append_images=frames[1:])
    data = build(tmp_path, val_fraction=0.1)
    assert told(
        data, "2 of 20 pictures looked at hold several frames or pages", "x0.tif", "the first is taken"
    )


# 16 bits, many pixels, other formats


def grey(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint16)).save(path)


def test_16_bit_pictures_of_a_small_range_keep_their_contrast(tmp_path):
    ramp = np.linspace(291, 694, 64).reshape(8, 8)
    for split, low in (("train", 0), ("val", 100)):
        for i in range(3):
            grey(tmp_path / split / "cat" / f"{i}.png", ramp[: 8 - i] + low * (i == 0))
    data = build(tmp_path, augment="none", crop_fraction=1.0)
    assert told(data, "values 291 to 694", "data.value_range")
    assert data.train[0][0].unique().numel() > 60
    whole, shifted = (data.train.levels, data.test.levels)
    assert whole == shifted == (291, 694)
    # the same grey in both splits, and what is brighter than all training pictures is white
    assert torch.equal(data.test[1][0], data.train[1][0])
    assert data.test[0][0].max() == 255
    full = build(tmp_path, augment="none", crop_fraction=1.0, value_range=[0, 65535])
    assert full.train[0][0].unique().tolist() == [1, 2]
    assert "value_range" in error(tmp_path, value_range=[5, 5])


def test_the_bit_depth_that_a_file_says_counts(tmp_path):
    values = np.array([[0, 2048], [4095, 1000]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={281: 4095})
    found = np.asarray(decode(tmp_path / "a.tif", "a", levels=(0, 500)))[..., 0]
    assert found.tolist() == [[0, 127], [255, 62]]
    Image.fromarray(values).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    place = content.index(b"IDAT") - 4
    said = content[:place] + b"\0\0\0\1sBIT\x0c" + (0x00000000).to_bytes(4) + content[place:]
    import zlib

    said = said.replace(b"sBIT\x0c\0\0\0\0", b"sBIT\x0c" + zlib.crc32(b"sBIT\x0c").to_bytes(4))
    assert np.asarray(decode(said, "a"))[..., 0].tolist() == found.tolist()


def test_huge_pictures_are_decoded_at_a_fraction_or_refused(tmp_path):
    photo, drawing = paint(tmp_path / "a.jpg", size=(400, 200)), paint(tmp_path / "a.png", size=(400, 200))
    assert decode(photo, "a", max_pixels=80_000).size == (400, 200)
    assert decode(photo, "a", max_pixels=79_999).size == (200, 100)
    assert decode(photo, "a", max_pixels=5_000).size == (100, 50)
    with pytest.raises(UserError, match=r"400x200 pixels, more than data\.max_pixels=5000"):
        decode(drawing, "a", max_pixels=5_000)
    wide = Image.new("L", (20_000, 9_000)).resize((20_000, 9_000))
    wide.save(tmp_path / "wide.jpg")
    assert decode(tmp_path / "wide.jpg", "wide").size == (10_000, 4_500)


def test_no_other_program_is_asked_to_read_a_picture(tmp_path, monkeypatch):
    import PIL.EpsImagePlugin

    def run(*args, **more):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", run)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.jpg").write_bytes(script)
    with pytest.raises(UserError, match="it is no picture"):
        decode(tmp_path / "a.jpg", "a")


# small pictures


def test_small_pictures_of_one_size_are_trained_on_as_arrays_are(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        place = tmp_path / ("train" if i < 16 else "val") / str(i % 2) / f"{i:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    from diffkd.data.base import builder

    data = builder("folder")(str(tmp_path))
    order = [*range(0, 16, 2), *range(1, 16, 2)]
    x = torch.from_numpy(noise[order]).permute(0, 3, 1, 2)
    assert (data.image_shape, data.train.crop_padding, data.train.flip) == ((3, 32, 32), 4, True)
    assert torch.equal(data.train.images[:, :, 4:-4, 4:-4], x)
    assert data.train.targets.tolist() == [0] * 8 + [1] * 8
    assert np.allclose(data.mean, (x / 255).mean((0, 2, 3)))
    assert told(data, "32x32", "kept in memory", "data.image_size=224")
    large = builder("folder")(str(tmp_path), image_size=224)
    assert large.image_shape == (3, 224, 224)
    cut = builder("folder")(str(tmp_path), image_size=32, augment="crop", crop_padding=2, cutout=40)
    assert cut.train[0][0].flatten(1).unique(dim=1).shape[1] < 3 * 32 * 32


# lists


def write(path, *rows, header="path,label"):
    path.write_text("\n".join([header, *rows]) + "\n")


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_lists_of_other_programs_are_understood(tmp_path, mark):
    tree(tmp_path / "images", count=2)
    header = mark.join(["id", "FileName", "Class"])
    rows = [mark.join(["7", f"images\\{name}\\{i}.png", name]) for name in ("cat", "dog") for i in (0, 1)]
    write(tmp_path / "my list.csv", *rows, header=header)
    data = build(tmp_path, "table", val_fraction=0.5)
    assert (data.class_names, targets(data.train), targets(data.test)) == (("cat", "dog"), [0, 1], [0, 1])
    assert told(data, "the paths are in column 'FileName'")
    assert told(data, "the labels are in column 'Class'")
    write(tmp_path / "other.csv", *rows[:1], header=header)
    assert "data.train_file=NAME" in error(tmp_path, "table")
    data = build(tmp_path, "table", train_file="my list.csv", test_file="other.csv")
    assert (len(data.train), len(data.test)) == (4, 1)
    assert "no file" in error(tmp_path, "table", train_file="no.csv")


def test_labels_that_begin_at_one_are_said_and_can_be_counted_from_there(tmp_path):
    tree(tmp_path, count=4)
    rows = [f"{name}/{i}.png,{label}" for name, label in (("cat", 1), ("dog", 2)) for i in range(4)]
    write(tmp_path / "train.csv", *rows)
    data = build(tmp_path, "table")
    assert data.num_classes == 3
    assert told(data, "no training picture of class 0", "data.first_label=1")
    data = build(tmp_path, "table", first_label=1)
    assert (data.num_classes, sorted(set(targets(data.train)))) == (2, [0, 1])
    assert not told(data, "first_label")
    assert "label '1' in row 2" in error(tmp_path, "table", first_label=2)
    x = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", x=x, y=np.array([1, 2, 3] * 2))
    from diffkd.data.base import builder

    assert told(builder("arrays")(str(tmp_path)), "no training picture of class 0")
    arrays = builder("arrays")(str(tmp_path), first_label=1)
    assert (arrays.num_classes, arrays.test.targets.tolist()) == (3, [0, 1, 2] * 2)


@pytest.mark.parametrize("label", [10**10, 10**6, 2**64 - 1, 2**80])
def test_labels_beyond_all_measure_are_refused(tmp_path, label):
    tree(tmp_path)
    write(tmp_path / "train.csv", *[f"cat/{i}.png,{label * (i == 2)}" for i in range(4)])
    assert f"{label + 1} classes" in error(tmp_path, "table")
    if label < 2**64:
        for split in ("train", "test"):
            y = np.array([0, label], np.uint64)
            np.savez(tmp_path / f"{split}.npz", x=np.zeros((2, 4, 4), np.uint8), y=y)
        from diffkd.data.base import builder

        with pytest.raises(UserError, match=rf"{label}|{label + 1} classes"):
            builder("arrays")(str(tmp_path))


def test_sizes_beyond_all_measure_are_refused(tmp_path):
    from diffkd.data.base import builder

    with pytest.raises(UserError, match=r"data\.shift=100000000"):
        builder("digits")(None, shift=100_000_000)
    tree(tmp_path)
    assert "data.image_size=100000000" in error(tmp_path, image_size=100_000_000)
    assert "enlarges pictures beyond" in error(tmp_path, image_size=16384)
    assert "data.num_classes=100000000" in error(tmp_path, labels="none", num_classes=100_000_000)
    assert "data.crop_padding=9" in error(tmp_path, augment="crop", crop_padding=9)


def test_labels_that_are_whole_numbers_count_whatever_their_type(tmp_path):
    from diffkd.data.base import builder

    for y, found in (([0.0, 1.0, 2.0], [0, 1, 2]), ([True, False, True], [1, 0, 1])):
        for split in ("train", "test"):
            np.savez(tmp_path / f"{split}.npz", x=np.zeros((3, 4, 4), np.uint8), y=np.array(y))
        assert builder("arrays")(str(tmp_path)).test.targets.tolist() == found
    for y in ([0.5, 1.0, 2.0], [np.nan, 0, 1], [1e30, 0, 1], ["a", "b", "c"]):
        np.savez(tmp_path / "train.npz", x=np.zeros((3, 4, 4), np.uint8), y=np.array(y))
        with pytest.raises(UserError, match=r"must be integers: np\.unique"):
            builder("arrays")(str(tmp_path))


def test_one_hot_labels_of_arrays_are_named(tmp_path):
    from diffkd.data.base import builder

    np.savez(tmp_path / "train.npz", x=np.zeros((6, 4, 4), np.uint8), y=np.eye(6, 3))
    with pytest.raises(UserError, match=r"one-hot.*argmax"):
        builder("arrays")(str(tmp_path))
