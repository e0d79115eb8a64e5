"""From a picture file to 8-bit RGB: only the formats that are meant, whatever a file is called."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from diffkd.errors import UserError

ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp"),
    *(".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm"),
)
# Pillow alone would also try formats that call other programs, as EPS calls Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", TiffImageFile.format, WebPImageFile.format)
HEIC = (".heic", ".heif", ".hif")  # telephones' own; decoded where pillow-heif is installed
_HEIC_WAY = "pip install pillow-heif decodes it, or save it as JPEG"
MAX_PIXELS = 178_956_970  # Pillow's own limit
_MOST_SAMPLES, _LARGEST = 281, 65535  # TIFF's tag MaxSampleValue
_ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values of pictures on their sides


def decode(
    picture: Path | bytes | Image.Image,
    name: str,
    *,
    levels: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """A picture as 8-bit RGB, upright as its EXIF orientation says; of an animation the first frame.

    Grey, palette and CMYK pictures are converted, transparency is dropped, what has 16 bits a channel is
    scaled to 8: by the bit depth that the file says, else by `levels`, else by the bits that its largest
    value takes.

    Args:
        picture: a file, its content, or a picture opened already.
        name: what an error calls it.
        levels: values of 16-bit pictures that become black and white.
        max_pixels: a JPEG of more is decoded at the largest fraction that has no more.

    Raises:
        UserError: it is missing, empty, truncated, no picture, too large, or of floating-point values.
    """
    try:
        if isinstance(picture, Image.Image):
            return as_rgb(picture, levels)
        with opened(picture) as found:
            shrink(found, 1, max_pixels)
            if found.format == "JPEG" and found.mode == "RGB" and turned(found) == 1:
                found.load()  # it is RGB as it is: no copy
                return found
            return as_rgb(found, levels)
    except Exception as error:  # damaged files raise nearly anything, even SyntaxError
        raise unreadable(name, error) from error


def turned(picture: Image.Image) -> int:
    """How an opened JPEG lies, as EXIF numbers it; 1 is upright."""
    return picture.getexif().get(_ORIENTATION, 1) if {"exif", "xmp"} & picture.info.keys() else 1


@contextmanager
def opened(picture: Path | bytes) -> Iterator[Image.Image]:
    """A picture whose pixels are not decoded yet.

    Raises:
        ValueError: the file is empty or not a regular file. Pillow's errors pass.
    """
    content = content_of(picture)
    with _open(BytesIO(content)) as found:
        if found.format == "PNG":
            found.info["sBIT"] = _significant_bits(content)
        yield found


def content_of(picture: Path | bytes) -> bytes:
    """The bytes of a file, or those given.

    Raises:
        ValueError: there are none, or it is not a regular file.
    """
    _check_content(picture)
    return picture if isinstance(picture, bytes) else picture.read_bytes()


def _check_content(picture: Path | bytes) -> None:
    if not (picture if isinstance(picture, bytes) else regular_size(picture)):
        raise ValueError("it is empty (0 bytes)")


def regular_size(place: Path) -> int:
    """Bytes of a regular file.

    Raises:
        OSError: there is none.
        ValueError: it is something else: a pipe would be waited for, a device has no end.
    """
    found = place.stat()
    if not S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    return found.st_size


def _open(picture: Path | BytesIO) -> Image.Image:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours is checked after drafting
    formats = (*_FORMATS, "HEIF") if _is_heic(picture) and reads_heic() else _FORMATS
    try:
        return Image.open(picture, formats=formats)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@cache
def reads_heic() -> bool:
    """Whether pillow-heif is installed; it is told to Pillow then."""
    try:
        import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def _is_heic(picture: Path | BytesIO) -> bool:
    """Whether a file begins as HEIF does, whatever it is called."""
    if isinstance(picture, Path):
        with picture.open("rb") as file:
            start = file.read(12)
    else:
        start = picture.getvalue()[:12]
    return start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc")


def shrink(picture: Image.Image, may: int, max_pixels: int) -> int:
    """Has a JPEG decoded at a fraction of its size, to `1 / may` at least, or less where it must be.

    Returns:
        Of how many times its height and width it is.

    Raises:
        ValueError: it would be larger than `max_pixels` still.
    """
    width, height = picture.size
    # one draft only: Pillow does not take a second one into account
    part = next((p for p in (1, 2, 4, 8) if (-(-width // p)) * (-(-height // p)) <= max_pixels), 8)
    part = max(part, next(p for p in (8, 4, 2, 1) if p <= max(may, 1)))
    if part > 1:
        picture.draft(None, (width // part, height // part))
    if picture.width * picture.height > max_pixels:
        raise ValueError(
            f"it has {width}x{height} pixels, more than data.max_pixels={max_pixels}; "
            "give a larger data.max_pixels, or make it smaller"
        )
    return part


def as_rgb(picture: Image.Image, levels: tuple[int, int] | None) -> Image.Image:
    """An opened picture as `decode` gives it, a copy.

    Raises:
        ValueError: its values are none of a picture.
    """
    if picture.mode == "F":
        raise ValueError("it holds floating-point values; save it with 8 or 16 bits")
    if is_deep(picture):
        told = told_levels(picture)
        values = _values(picture)
        low, high = told or levels or (0, (1 << max(int(values.max()).bit_length(), 8)) - 1)
        scaled = values >> 8 if (low, high) == (0, _LARGEST) else (values - low) * 255 // max(high - low, 1)
        return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("P", "PA"):  # straight to RGB warns where the palette has transparency
        picture = picture.convert("RGBA")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def is_deep(picture: Image.Image) -> bool:
    """Whether an opened picture has more than 8 bits a channel."""
    return picture.mode.startswith("I") or _raw_mode(picture) in _LOWER_BYTES


# How Pillow reads colours of 16 bits, of which it keeps the upper bytes, and how it reads the lower ones.
_LOWER_BYTES = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA", "RGBX")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
}
_GREY_AND_ALPHA = "LA;16B"  # read as RGBA, upper and lower bytes stand side by side
_LOWER_BYTES[_GREY_AND_ALPHA] = "RGBA"


def _raw_mode(picture: Image.Image) -> str:
    tiles = getattr(picture, "tile", None)
    args = tiles[0][3] if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _values(picture: Image.Image) -> np.ndarray:
    """Values `(H, W)` or `(H, W, 3)` int64 of a picture of more than 8 bits, upright."""
    if picture.mode.startswith("I"):
        values = np.asarray(ImageOps.exif_transpose(picture)).astype(np.int64)
    else:
        raw = _raw_mode(picture)
        lower = np.asarray(ImageOps.exif_transpose(_lower_bytes(picture, raw))).astype(np.int64)
        if raw == _GREY_AND_ALPHA:
            values = (lower[..., 0] << 8) + lower[..., 1]
        else:
            upper = np.asarray(ImageOps.exif_transpose(picture)).astype(np.int64)
            values = ((upper << 8) + lower)[..., :3]
    if values.min() < 0 or values.max() > _LARGEST:
        found = f"its values go from {values.min()} to {values.max()}"
        raise ValueError(f"{found}; save them in unsigned 16 bits, 0 to {_LARGEST}")
    return values


def _lower_bytes(picture: Image.Image, raw: str) -> Image.Image:
    """An opened picture of 16-bit colours once more, to be read as what Pillow drops of them."""
    file: Any = picture.fp  # type: ignore[attr-defined]
    place = file.tell()
    file.seek(0)
    lower: Any = _open(BytesIO(file.read()))
    file.seek(place)
    raw = _LOWER_BYTES[raw]
    lower.tile = [
        tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw)
        for tile in lower.tile
    ]
    return lower  # type: ignore[no-any-return]


def told_levels(picture: Image.Image) -> tuple[int, int] | None:
    """Black and white of a picture of 9 to 15 bits as the file says them; None where it does not."""
    if bits := picture.info.get("sBIT"):
        return (0, (1 << bits) - 1) if 8 < bits < 16 else None
    tags = getattr(picture, "tag_v2", None)
    most = tags.get(_MOST_SAMPLES) if tags else None
    most = most[0] if isinstance(most, tuple) else most
    return (0, int(most)) if most and 255 < most < _LARGEST else None


def _significant_bits(content: bytes) -> int | None:
    """What a PNG says of its depth, of colours the deepest one's, before its pixels."""
    place = content.find(b"sBIT", 0, max(content.find(b"IDAT"), 0))
    length = int.from_bytes(content[place - 4 : place]) if place > 3 else 0
    return max(content[place + 4 : place + 4 + length]) if 1 <= length <= 4 else None


class Header(NamedTuple):
    """What the header of a picture says.

    Attributes:
        height, width: upright, as its EXIF orientation says.
        deep: it has more than 8 bits a channel.
    """

    height: int
    width: int
    deep: bool


def header(picture: Path | bytes | Image.Image, name: str) -> Header:
    """What a picture says of itself before its pixels.

    Raises:
        UserError: there is no such header.
    """
    try:
        if isinstance(picture, Image.Image):
            return Header(picture.height, picture.width, is_deep(picture))
        _check_content(picture)
        with _open(picture if isinstance(picture, Path) else BytesIO(picture)) as found:
            told = "exif" in found.info or found.format == TiffImageFile.format  # a PNG would be decoded
            width, height = found.size
            if told and found.getexif().get(_ORIENTATION, 1) in LYING:
                width, height = height, width
            return Header(height, width, is_deep(found))
    except Exception as error:
        raise unreadable(name, error) from error


def frames(picture: Path | bytes | Image.Image) -> int:
    """Frames of an animation, or pages; 1 of JPEGs, of what is opened already, and of what cannot be read."""
    if isinstance(picture, Image.Image):
        return 1
    try:
        with opened(picture) as found:
            return 1 if isinstance(found, JpegImageFile) else int(getattr(found, "n_frames", 1))
    except Exception:
        return 1


def used_colours(place: Path) -> dict[int, tuple[int, int, int]]:
    """Red, green and blue of the indices that a picture with a palette uses; empty of any other."""
    try:
        with opened(place) as found:
            if found.mode != "P":
                return {}
            parts = found.getpalette("RGB") or []
            used = np.unique(np.asarray(found)).tolist()
    except Exception:  # it will be named where it is wanted
        return {}
    return {i: (parts[3 * i], parts[3 * i + 1], parts[3 * i + 2]) for i in used if 3 * i + 2 < len(parts)}


def loses(picture: Image.Image, place: Path) -> str | None:
    """What an opened picture is where its values are not exactly those that were saved; else None."""
    if picture.format == "JPEG":
        return "JPEG"
    if picture.format == TiffImageFile.format and "jpeg" in str(picture.info.get("compression")):
        return "TIFF with JPEG inside"
    return "lossy WebP" if picture.format == WebPImageFile.format and _lossy_webp(place) else None


def _lossy_webp(place: Path) -> bool:
    """Whether a WebP file's pixels are in a chunk of the lossy kind."""
    content, start = place.read_bytes(), 12
    while start + 8 <= len(content):
        if content[start : start + 4] == b"VP8 ":
            return True
        length = int.from_bytes(content[start + 4 : start + 8], "little")
        start += 8 + length + length % 2
    return False


def unreadable(name: str, error: Exception, what: str = "picture") -> UserError:
    """The error that names a file that cannot be read, and why."""
    reason = "it is no picture" if isinstance(error, UnidentifiedImageError) else str(error)
    reason = getattr(error, "strerror", None) or reason  # which does not name the file once more
    if isinstance(error, UnidentifiedImageError) and name.lower().endswith(HEIC) and not reads_heic():
        reason = _HEIC_WAY
    return UserError(f"cannot read {what} '{name}': {reason.partition(chr(10))[0]}")


def deep_values(picture: Path | bytes | Image.Image) -> tuple[int, int] | None:
    """Least and largest value of a 16-bit picture that does not say its depth; None of any other."""
    try:
        if isinstance(picture, Image.Image):
            return _range(picture)
        with opened(picture) as found:
            return _range(found)
    except Exception:
        return None  # it will be named where it is wanted


def _range(picture: Image.Image) -> tuple[int, int] | None:
    if not is_deep(picture) or told_levels(picture):
        return None
    values = _values(picture)
    return int(values.min()), int(values.max())
