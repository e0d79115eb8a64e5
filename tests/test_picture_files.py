"""Picture files: every format read, damaged ones named, views drawn from them."""

import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.errors import UserError
from diffkd.pictures.augment import Erase, PictureOptions
from diffkd.pictures.crops import Crop, RandomView, decode_crop
from diffkd.pictures.decoding import decode
from diffkd.pictures.files import Files
from picture_cases import GREEN, RED, paint

# decoding


@pytest.mark.parametrize(
    ("name", "mode", "save"),
    [
        ("a.jpg", "RGB", {"quality": 100, "subsampling": 0}),
        ("a.jpg", "CMYK", {"quality": 100, "subsampling": 0}),
        ("a.png", "P", {}),
        ("a.png", "P", {"transparency": b"\x00\x80"}),
        ("a.png", "RGBA", {}),
        ("a.webp", "RGB", {"lossless": True}),
        ("a.tif", "RGB", {}),
        ("a.bmp", "RGB", {}),
        ("a.gif", "P", {}),
    ],
)
def test_colour_survives_every_format(tmp_path, name, mode, save):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = decode(paint(tmp_path / name, mode=mode, **save), "a")
    assert (picture.mode, picture.size) == ("RGB", (12, 10))
    assert np.allclose(np.asarray(picture), RED, atol=2)


@pytest.mark.parametrize(("mode", "value", "grey"), [("L", 200, 200), ("1", 255, 255), ("LA", (90, 7), 90)])
def test_grey_pictures_become_rgb(tmp_path, mode, value, grey):
    Image.new(mode, (4, 3), value).save(tmp_path / "a.png")
    assert (np.asarray(decode(tmp_path / "a.png", "a")) == grey).all()


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, ending):
    values = np.array([[0, 255, 256], [32768, 40000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    assert np.array_equal(np.asarray(decode(tmp_path / f"a.{ending}", "a"))[..., 1], values >> 8)


def test_pictures_are_turned_upright(tmp_path):
    picture = Image.new("RGB", (12, 10), RED)
    picture.paste(GREEN, (0, 0, 12, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    picture.save(tmp_path / "a.jpg", exif=exif, quality=100)
    upright = np.asarray(decode(tmp_path / "a.jpg", "a"))
    assert upright.shape == (12, 10, 3)
    assert upright[:, -1, 1].min() > 200 > upright[:, 0, 1].max()


def damaged(folder):
    """Files that are no pictures, each with a word of the error."""
    good = paint(folder / "good.png", size=(64, 64)).read_bytes()
    photo = paint(folder / "good.jpg", size=(64, 64)).read_bytes()
    Image.fromarray(np.zeros((2, 2), np.float32)).save(folder / "float.tif")
    yield folder / "float.tif", "floating-point"
    for name, content, word in [
        ("empty.jpg", b"", "0 bytes"),
        ("text.png", b"no picture at all", "no picture"),
        ("short.jpg", photo[:-40], "truncated"),
        ("short.png", good[:60], "truncated"),
        ("broken.png", good[:40] + b"\xff" * 20 + good[60:], "broken"),
    ]:
        (folder / name).write_bytes(content)
        yield folder / name, word
    yield folder / "missing.jpg", "No such file"


def test_unreadable_files_are_named(tmp_path):
    for path, word in damaged(tmp_path):
        with pytest.raises(UserError, match=word) as caught:
            decode(path, str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("at_least", "size"), [(600, (1000, 600)), (240, (500, 300)), (75, (125, 75))])
def test_large_photos_are_decoded_at_a_fraction_that_is_large_enough(tmp_path, at_least, size):
    photo = paint(tmp_path / "a.jpg", size=(1600, 1000))
    part = decode_crop(photo, "a", lambda h, w: Crop(0, w - 600, h, 600), at_least)
    assert tuple(part.shape[1:]) == size
    assert decode(photo, "a").size == (1600, 1000)


def jpegs(folder):
    """Pictures of one noise, as files of many kinds."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 44, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, mode, save in [
        ("plain.jpg", "RGB", {"quality": 75}),
        ("progressive.jpg", "RGB", {"progressive": True, "subsampling": 0}),
        ("grey.jpg", "L", {}),
        ("cmyk.jpg", "CMYK", {}),
        ("turned.jpg", "RGB", {"exif": exif}),
        (
            "many.jpg",
            "RGB",
            {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (44, 30))]},
        ),
        ("turned.tif", "RGB", {"exif": exif}),
        ("plain.png", "RGB", {}),
    ]:
        Image.fromarray(noise).convert(mode).save(folder / name, **save)
        yield folder / name


def test_a_part_of_a_picture_is_that_of_the_whole_one(tmp_path):
    for place in jpegs(tmp_path):
        whole = np.asarray(decode(place, "a")).transpose(2, 0, 1)
        for picture in (place, place.read_bytes(), Image.open(place)):
            part = decode_crop(picture, "a", lambda h, w: Crop(h - 21, 3, 21, w - 4), 100)
            assert np.array_equal(part, whole[:, -21:, 3:-1]), place


def test_damaged_jpegs_are_told_as_when_decoded_whole(tmp_path, capfd):
    content = next(jpegs(tmp_path)).read_bytes()
    for end in range(2, len(content) - 2, 97):
        errors = []
        for read in (decode, lambda *given: decode_crop(*given, lambda h, w: Crop(0, 0, h, w), 100)):
            with pytest.raises(UserError) as caught:
                read(content[:end], "a.jpg")
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
    assert capfd.readouterr().err == ""


# augmentation


def view(transform, picture, seed=0):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return transform(picture)


@pytest.mark.parametrize(
    "augment",
    [
        "none",
        "crop",
        "light",
        "trivial",
        "randaugment",
        "autoaugment",
        "rand-m9-mstd0.5-inc1",
        "v0-mstd0.5",
        "3a",
    ],
)
def test_augmentations_are_random_repeatable_and_go_to_other_processes(augment):
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    transform = PictureOptions(image_size=16, augment=augment, random_erasing=0.5).train_transform()
    views = [view(transform, picture, seed) for seed in range(6)]
    assert all(v.shape == (3, 16, 16) and v.dtype == torch.uint8 for v in views)
    again = [view(pickle.loads(pickle.dumps(transform)), picture, seed) for seed in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert any(not torch.equal(views[0], v) for v in views[1:]) == (augment != "none")


def test_a_random_part_has_the_share_and_the_proportions_said():
    view = RandomView(8, scale=(0.2, 0.5))
    crops = [view.crop(300, 400, torch.rand(23).tolist()) for _ in range(400)]
    shares = np.array([crop.height * crop.width / 120_000 for crop in crops])
    shapes = np.array([crop.width / crop.height for crop in crops])
    assert 0.195 < shares.min() < 0.21 < 0.34 < shares.mean() < 0.36 < 0.49 < shares.max() < 0.505
    assert 0.74 < shapes.min() < 0.77 < 1.3 < shapes.max() < 1.35
    assert abs(np.log(shapes).mean()) < 0.03  # as often wide as high
    assert all(0 <= c.top <= 300 - c.height and 0 <= c.left <= 400 - c.width for c in crops)
    tops = np.array([crop.top / (300 - crop.height) for crop in crops])
    assert abs(tops.mean() - 0.5) < 0.05
    assert view.crop(10, 1000, torch.rand(23).tolist()) == Crop(0, 493, 10, 13)  # nothing fits: the centre


def test_the_part_seen_is_that_of_the_picture_and_every_second_is_mirrored(tmp_path):
    across = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    picture = Image.fromarray(np.stack([across, across.T, across], -1))
    view = RandomView(16, scale=(0.05, 1.0))
    mirrored = 0
    for seed in range(60):
        torch.manual_seed(seed)
        crop = view.crop(256, 256, torch.rand(23).tolist())
        torch.manual_seed(seed)
        seen = view(picture).float()
        columns, rows = seen[0].mean(0), seen[1].mean(1)
        mirrored += (turned := bool(columns[0] > columns[-1]))
        steps = torch.arange(16) + 0.5
        expected = crop.left + steps * crop.width / 16 - 0.5, crop.top + steps * crop.height / 16 - 0.5
        inner = slice(2, -2)
        found = columns.flip(0) if turned else columns
        assert torch.allclose(found[inner], expected[0][inner], atol=1)
        assert torch.allclose(rows[inner], expected[1][inner], atol=1)
    assert 20 <= mirrored <= 40


def test_an_unreadable_picture_s_stand_in_is_seen_alike_ever_after(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for name in "ab":
        Image.fromarray(noise).save(tmp_path / f"{name}.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    options = PictureOptions(image_size=16, augment="randaugment", max_corrupt=1)
    pictures, _ = options.splits(*[Files(tmp_path, ["a.jpg", "b.jpg"], None)] * 2)
    with pytest.warns(UserWarning, match="truncated"):
        first = view(pictures.__getitem__, 0)
    assert torch.equal(first, view(pictures.__getitem__, 0))


def test_test_pictures_show_the_centre():
    picture = Image.new("RGB", (40, 20), RED)
    picture.paste(GREEN, (15, 5, 25, 15))
    centre = PictureOptions(image_size=10, crop_fraction=0.5).test_transform()(picture)
    assert (centre[:, 2:-2, 2:-2] == torch.tensor(GREEN, dtype=torch.uint8).view(3, 1, 1)).all()
    assert PictureOptions(image_size=10, crop_fraction=1.0).test_transform()(picture)[0, 0, 0] == RED[0]


def test_erasing_is_as_frequent_and_as_large_as_said():
    torch.manual_seed(0)
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    erase = Erase(0.25, scale=(0.1, 0.2))
    shares = [(erase(picture) > 0).any(0).float().mean().item() for _ in range(400)]
    hit = [share for share in shares if share]
    assert 70 < len(hit) < 130
    assert min(hit) > 0.07
    assert max(hit) < 0.23
    assert not picture.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"augment": "randaugmnet"}, "did you mean 'randaugment'"),
        ({"augment": "rand-foo"}, "data.augment 'rand-foo'"),
        ({"image_size": 0}, "data.image_size=0"),
        ({"random_erasing": 1.5}, "data.random_erasing=1.5"),
        ({"min_scale": 0.0}, "data.min_scale=0.0"),
        ({"max_corrupt": -1}, "data.max_corrupt=-1"),
    ],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(UserError, match=words):
        PictureOptions(**options)
