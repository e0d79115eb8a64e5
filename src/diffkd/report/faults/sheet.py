"""Pictures of pictures and of figures, drawn with Pillow: contact sheets, confusion, reliability."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from diffkd.errors import plain
from diffkd.runs.disk import write_atomically
from diffkd.use.drawing import font, picture_of

INK, SOFT, FAINT, PAPER, ACCENT = "#1b1e24", "#555c67", "#e5e2da", "#ffffff", "#3450c4"
_GAP, _WIDTH = 12, 1000  # pixels: as wide as the page shows it whole
_LEAST, _MOST = 132, 320  # pixels of a picture's longer side
_MANY = 60  # classes above which a matrix carries no names


class Row(NamedTuple):
    """What belongs together on a contact sheet.

    Attributes:
        images: `(3, H, W)` uint8 each, side by side.
        says: a line beneath them.
    """

    images: tuple[Tensor, ...]
    says: str


def fitted(text: str, size: int, room: float) -> str:
    """A text cut to a width in pixels.

    >>> fitted("a long name", 12, 60)[-1], fitted("short", 12, 60)
    ('…', 'short')
    """
    text = plain(text)  # line breaks in names are none here
    if font(size).getlength(text) <= room:
        return text
    while text and font(size).getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text}…"


def contact_sheet(rows: Sequence[Row], place: Path) -> None:
    """Rows of pictures with a line beneath each, as a PNG; small pictures are enlarged pixel by pixel."""
    cells = [_cell(row) for row in rows]
    width = max(cell.width for cell in cells) + _GAP
    columns = max(1, min(len(cells), (_WIDTH - _GAP) // width))
    lines = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in line) + _GAP for line in lines]
    sheet = Image.new("RGB", (columns * width + _GAP, sum(heights) + _GAP), PAPER)
    top = _GAP
    for line, height in zip(lines, heights, strict=True):
        for column, cell in enumerate(line):
            sheet.paste(cell, (_GAP + column * width, top))
        top += height
    _save(sheet, place)


def _cell(row: Row) -> Image.Image:
    pictures = [_enlarged(picture_of(image)) for image in row.images]
    width = sum(picture.width for picture in pictures) + 4 * (len(pictures) - 1)
    height = max(picture.height for picture in pictures)
    lines = [fitted(line, 12, max(width, _LEAST)) for line in row.says.split("\n")]
    cell = Image.new("RGB", (max(width, _LEAST), height + 4 + 16 * len(lines)), PAPER)
    left = 0
    for picture in pictures:
        cell.paste(picture, (left, 0))
        left += picture.width + 4
    pen = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        pen.text((0, height + 3 + 16 * number), line, INK, font(12))
    return cell


def _enlarged(picture: Image.Image) -> Image.Image:
    longer = max(picture.size)
    if longer < _LEAST:
        factor = -(-_LEAST // longer)
        return picture.resize(
            (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
        ).resize(
            (round(picture.width * _LEAST / longer), round(picture.height * _LEAST / longer)),
            Image.Resampling.BOX,
        )
    if longer > _MOST:
        picture = picture.copy()
        picture.thumbnail((_MOST, _MOST))
    return picture


def confusion_picture(matrix: np.ndarray, names: Sequence[str], place: Path) -> None:
    """A confusion matrix `(K, K)` as a PNG: rows are the truth, shades are shares of the row.

    Errors are orange, right answers blue. Up to 60 classes carry their names, up to 20 their counts, or the
    shares where counts are too long.
    """
    count = len(matrix)
    cell = max(2, min(40, 860 // count))
    told = count <= _MANY
    room = int(max(font(12).getlength(fitted(name, 12, 150)) for name in names)) + 10 if told else 24
    side = cell * count
    title = "truth down, answer across; shades are shares of the row"
    long = int(font(12).getlength(title)) + 12
    width = max(room + side + 24, long + 12)  # a small matrix is narrower than its title
    sheet = Image.new("RGB", (width, side + room + 30), PAPER)
    pen = ImageDraw.Draw(sheet)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    pen.text((min(room, width - long), 4), title, SOFT, font(12))
    top, long_counts = 24, matrix.max(initial=0) >= 10_000
    for i in range(count):
        for j in np.flatnonzero(matrix[i]).tolist():
            share, left, up = float(shares[i, j]), room + j * cell, top + i * cell
            pen.rectangle((left, up, left + cell - 1, up + cell - 1), _shade(share, i == j))
            if count <= 20:
                shown = f"{100 * share:.0f}%" if long_counts else f"{matrix[i, j]:,}"
                shown = "<1%" if shown == "0%" else shown
                ink = PAPER if share > 0.55 else INK
                pen.text((left + cell / 2, up + cell / 2), shown, ink, font(11), anchor="mm")
    pen.rectangle((room - 1, top - 1, room + side, top + side), outline=FAINT)
    if told:
        _names(sheet, names, cell, room, top)
    _save(sheet, place)


def _names(sheet: Image.Image, names: Sequence[str], cell: int, room: int, top: int) -> None:
    """Classes at the left of the rows, and on their side beneath the columns."""
    pen, side = ImageDraw.Draw(sheet), cell * len(names)
    for i, name in enumerate(names):
        shown = fitted(name, 12, 150)
        pen.text((room - 6, top + i * cell + cell / 2), shown, INK, font(12), anchor="rm")
        lying = Image.new("RGB", (room, 16), PAPER)
        ImageDraw.Draw(lying).text((room - 6, 8), shown, INK, font(12), anchor="rm")
        sheet.paste(lying.rotate(90, expand=True), (room + i * cell + cell // 2 - 8, top + side + 2))


def _shade(share: float, right: bool) -> tuple[int, int, int]:
    dark = (52, 80, 196) if right else (214, 84, 16)
    mix = share**0.6  # few errors are to be seen, too
    red, green, blue = (round(255 + (part - 255) * mix) for part in dark)
    return red, green, blue


def reliability_picture(bins: Sequence[tuple[float, float, int]], error: float, place: Path) -> None:
    """How often answers are right, over how sure they were, as a PNG.

    Args:
        bins: mean confidence, share that is right, number of pictures, of each.
        error: the expected calibration error.
        place: the file.
    """
    big, left, top, side = 2, 56, 30, 300
    sheet = Image.new("RGB", (big * (left + side + 24), big * (top + side + 52)), PAPER)
    pen = ImageDraw.Draw(sheet)
    total = max(sum(count for *_, count in bins), 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return big * (left + side * x), big * (top + side * (1 - y))

    for step in range(6):
        share = step / 5
        pen.line((*at(share, 0), *at(share, 1)), FAINT, big)
        pen.line((*at(0, share), *at(1, share)), FAINT, big)
        x, y = at(share, 0)
        pen.text((x, y + 8 * big), f"{100 * share:.0f}", SOFT, font(12 * big), anchor="mt")
        pen.text(
            (at(0, share)[0] - 6 * big, at(0, share)[1]),
            f"{100 * share:.0f}",
            SOFT,
            font(12 * big),
            anchor="rm",
        )
    pen.line((*at(0, 0), *at(1, 1)), SOFT, big)
    for confidence, right, count in bins:
        x, y = at(confidence, right)
        radius = big * (3 + 11 * (count / total) ** 0.5)
        pen.line((x, y, *at(confidence, confidence)), ACCENT, big)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), ACCENT, PAPER, big)
    pen.text(
        (big * left, big * 6), f"right answers, %; calibration error {100 * error:.2f} %", INK, font(12 * big)
    )
    pen.text(at(0.5, -0.1), "confidence, %", SOFT, font(12 * big), anchor="mt")
    _save(sheet, place)


def _save(sheet: Image.Image, place: Path) -> None:
    write_atomically(place, lambda partial: sheet.save(partial, format="png"))
