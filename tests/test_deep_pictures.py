"""Pictures of 16 bits a channel, alone and among others; what a look over some pictures says of all."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffkd.data.base import builder
from diffkd.pictures.decoding import decode, header
from diffkd.report.evaluation import _at_levels
from picture_cases import build, paint, tree


def deep_png(path, values, bits=None):
    """A PNG of `(H, W, C)` in 16 bits, which Pillow cannot write."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width, channels = values.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
        + (chunk(b"sBIT", bytes([bits] * channels)) if bits else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def deep_tiff(path, values, order="<"):
    """A TIFF of `(H, W, 3)` in 16 bits."""
    height, width, _ = values.shape
    data = values.astype(f"{order}u2").tobytes()
    start = 8 + len(data)
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 3, start),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 8),
        (277, 3, 1, 3),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
    ]
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, count)
        + (
            struct.pack(f"{order}HH", value, 0)
            if (kind, count) == (3, 1)
            else struct.pack(f"{order}I", value)
        )
        for tag, kind, count, value in tags
    )
    path.write_bytes(
        (b"II" if order == "<" else b"MM")
        + struct.pack(f"{order}HI", 42, start + 6)
        + data
        + struct.pack(f"{order}HHH", 16, 16, 16)
        + struct.pack(f"{order}H", len(tags))
        + entries
        + b"\0\0\0\0"
    )


def grey(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint16)).save(path)


RAMP = np.linspace(100, 900, 60).reshape(4, 5, 3).astype(np.int64)


@pytest.mark.parametrize("write", [deep_png, deep_tiff, lambda p, v: deep_tiff(p, v, ">")])
def test_colours_of_16_bits_keep_their_contrast(tmp_path, write):
    write(tmp_path / "a", RAMP)
    assert header(tmp_path / "a", "a") == (4, 5, True)
    own = np.asarray(decode(tmp_path / "a", "a"))
    assert np.array_equal(own, RAMP * 255 // 1023)  # 900 takes 10 bits
    assert np.array_equal(
        np.asarray(decode(tmp_path / "a", "a", levels=(100, 900))), (RAMP - 100) * 255 // 800
    )
    write(tmp_path / "b", RAMP * 70)
    assert np.array_equal(np.asarray(decode(tmp_path / "b", "b")), RAMP * 70 >> 8)


def test_alpha_and_the_depth_that_is_said_count_for_colours_too(tmp_path):
    opaque = np.full((4, 5, 1), 65535)
    deep_png(tmp_path / "rgba.png", np.concatenate([RAMP, opaque], 2))
    deep_png(tmp_path / "la.png", np.concatenate([RAMP[..., :1], opaque], 2))
    deep_png(tmp_path / "said.png", RAMP, bits=12)
    assert np.array_equal(np.asarray(decode(tmp_path / "rgba.png", "a")), RAMP * 255 // 1023)
    assert np.array_equal(np.asarray(decode(tmp_path / "la.png", "a"))[..., 2], RAMP[..., 0] * 255 // 1023)
    assert np.array_equal(np.asarray(decode(tmp_path / "said.png", "a", levels=(0, 9))), RAMP * 255 // 4095)


def test_a_rare_16_bit_picture_is_scaled_by_its_own_depth_and_said(tmp_path):
    tree(tmp_path, count=10)
    grey(tmp_path / "cat" / "4.png", [[100, 900]] * 4)
    data = build(tmp_path, augment="none", crop_fraction=1.0)
    assert any("1 of 20 pictures looked at are 16-bit ones" in note for note in data.notes)
    assert (data.train.levels, data.view.levels) == (None, None)
    found = np.asarray(decode(tmp_path / "cat" / "4.png", "a"))
    assert found[0, :, 0].tolist() == [100 * 255 // 1023, 900 * 255 // 1023]


def test_every_kind_of_data_hands_the_levels_on_to_prediction(tmp_path):
    for i in range(4):
        for name in ("images", "folder/cat", "folder/dog"):
            grey(tmp_path / name / f"{i}.png", [[300 + i, 600]] * 8)
        mask = tmp_path / "masks" / f"{i}.png"
        paint(mask)
        Image.fromarray(np.eye(8, 2, dtype=np.uint8)).save(mask)
        place = tmp_path / "labels" / f"{i}.txt"
        place.parent.mkdir(exist_ok=True)
        place.write_text("0 0.5 0.5 0.5 0.5\n")
    for name, root in (("folder", tmp_path / "folder"), ("masks", tmp_path), ("boxes", tmp_path)):
        data = builder(name)(str(root))
        assert any("16-bit pictures: values 30" in note for note in data.notes), name
        low, high = data.view.levels
        assert 300 <= low <= 301
        assert high == 600
        if name != "folder":
            assert data.train.levels == data.test.levels == (low, high)
            assert data.test[0][0].unique().tolist()[-1] == 255


def test_other_data_are_seen_at_the_levels_of_training(tmp_path):
    for i in range(4):
        for name in ("cat", "dog"):
            grey(tmp_path / name / f"{i}.png", [[300, 600]] * 8)
    data = build(tmp_path)
    found = _at_levels(data, (0, 1000))
    assert (found.test.levels, data.test.levels) == ((0, 1000), (300, 600))
    assert _at_levels(data, None) is data


def test_small_pictures_of_many_sizes_say_what_enlarging_them_costs(tmp_path):
    tree(tmp_path, count=4)
    paint(tmp_path / "cat" / "0.png", size=(14, 12))
    told = builder("folder")(str(tmp_path)).notes[-1]
    assert told.startswith("pictures of about 10x12 are enlarged to 224x224, 418 times the pixels")
    assert "data.image_size=12" in told
    for options in ({"image_size": 224}, {"image_size": 16}):
        assert not any("enlarged" in note for note in builder("folder")(str(tmp_path), **options).notes)
