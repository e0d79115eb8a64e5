"""Class tables of masks: which value or colour of a mask's pixel means which class."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffkd.errors import UserError
from diffkd.pictures.joint import VOID
from diffkd.pictures.options import quoted
from diffkd.pictures.rows import text_of

_VOID_NAMES = ("void", "ignore")
_MOST = 255  # classes, for 255 is void
_MOST_GAPS = 8  # values without a pixel that may be classes, where there are not more that have some
_RGB = 1 << 24  # added to a colour's code, so that it is not taken for a grey value

Counts = Mapping[int, int]  # pixels by code


@dataclass(frozen=True)
class ClassTable:
    """What the codes in masks mean.

    A code is a grey value, an index of a palette, a 16-bit value, or a colour (see `colour_code`).

    Attributes:
        names: of the classes, in their order.
        codes: class of each code; 255 for void.
    """

    names: tuple[str, ...]
    codes: Mapping[int, int]

    def labels(self, codes: np.ndarray) -> np.ndarray:
        """Classes `(H, W)` uint8 of a mask's codes `(H, W)`; a code that means nothing is void.

        >>> ClassTable(("ground", "road"), {0: 0, 7: 1}).labels(np.array([[0, 7, 255]])).tolist()
        [[0, 1, 255]]
        """
        known = np.array(sorted(self.codes), np.int64)
        classes = np.array([self.codes[code] for code in known.tolist()], np.uint8)
        places = np.searchsorted(known, codes).clip(max=len(known) - 1)
        return np.where(known[places] == codes, classes[places], VOID).astype(np.uint8)

    def told(self, pixels: Counts, what: str = "training") -> str:
        """Which code got which name, and each class's share of the pixels of a split, in words."""
        total = max(sum(pixels.values()), 1)
        parts = []
        for label, name in [*enumerate(self.names), (VOID, "void")]:
            codes = [code for code, found in self.codes.items() if found == label]
            share = sum(pixels.get(code, 0) for code in codes) / total
            codes = [code for code in codes if code in pixels] or codes[:1]  # a few of many that are void
            if codes:
                parts.append(f"{'/'.join(map(code_name, codes))} = {name} {_percent(share)}")
        return f"mask values and their share of the {what} pixels: " + ", ".join(parts)


def _percent(share: float) -> str:
    """A share in two digits, or as a whole number.

    >>> _percent(1.0), _percent(0.997), _percent(0.0033)
    ('100 %', '99.7 %', '0.33 %')
    """
    return f"{100 * share:.3g} %" if share > 0.1 else f"{100 * share:.2g} %"


def colour_code(red: int, green: int, blue: int) -> int:
    """The code of a colour, each part 0 to 255.

    >>> code_name(colour_code(128, 64, 0))
    '(128, 64, 0)'
    """
    return _RGB | red << 16 | green << 8 | blue


def code_name(code: int) -> str:
    """A code as people write it: the value, or the colour's parts."""
    return str(code) if code < _RGB else str((code >> 16 & 255, code >> 8 & 255, code & 255))


def is_colour(code: int) -> bool:
    """Whether a code is a colour's."""
    return code >= _RGB


def named(lines: Sequence[str]) -> tuple[tuple[str, ...], dict[int, int] | None]:
    """The classes that value 0, 1 and so on have, and what the values mean, where it is not as it seems.

    A name that comes twice is one class; `void` and `ignore` are no classes.

    >>> named(["road", "car", "road", "void"])
    (('road', 'car'), {0: 0, 1: 1, 2: 0, 3: 255})
    >>> named(["road", "car"])
    (('road', 'car'), None)
    """
    names = tuple(dict.fromkeys(name for name in lines if name.lower() not in _VOID_NAMES))
    if len(names) == len(lines):
        return names, None
    return names, {i: names.index(name) if name in names else VOID for i, name in enumerate(lines)}


def read_table(place: Path) -> tuple[tuple[str, ...], dict[int, int] | None]:
    """The names of a file's classes, and what its codes mean; None where it says names alone.

    One class a line: its name; or the value and the name; or red, green, blue and the name, or `#rrggbb`;
    separated by spaces, tabs, commas, semicolons, colons or equals signs, a colour before its name or
    after. Or JSON of the same: a list of names, or a mapping from names or values. Classes are numbered in
    their order; lines of one name are one class; the names `void` and `ignore` are no classes.

    Raises:
        UserError: the file cannot be read, or its lines are not alike.
    """
    try:
        text = text_of(place)
    except UnicodeDecodeError as error:
        raise UserError(f"'{place}' cannot be read as a list of classes: save it as UTF-8 text") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"'{place}' cannot be read as a list of classes: {reason}") from error
    rows = [_row(line) for line in _lines(text, place) if line and (line[0] != "#" or _HEX.search(line))]
    negative = next((name for _, name in rows if re.match(r"-\d+\b", name)), None)
    if negative is not None:
        raise UserError(f"'{place}': the line '{negative}' has a negative value; masks hold 0 and more")
    if len(rows) > 1 and not rows[0][0] and rows[1][0]:
        rows = rows[1:]  # a header
    if not rows:
        raise UserError(f"'{place}' names no classes")
    kinds = {len(numbers) for numbers, _ in rows}
    if len(kinds) > 1 or not kinds <= {0, 1, 3}:
        raise UserError(
            f"'{place}': every line needs a name, a value and a name, or three parts of a colour and a name"
        )
    for numbers, name in rows:
        if not name or (len(numbers) == 3 and not all(0 <= n <= 255 for n in numbers)):
            line = " ".join([*map(str, numbers), name])
            raise UserError(f"'{place}': the line '{line}' has no name, or no colour of 0 to 255")
    names, by_line = named([name for _, name in rows])
    if kinds == {0}:
        return names, by_line
    codes: dict[int, int] = {}
    for numbers, name in rows:
        code = numbers[0] if len(numbers) == 1 else colour_code(*numbers)
        if code in codes:
            raise UserError(f"'{place}' names {code_name(code)} twice")
        codes[code] = names.index(name) if name in names else VOID
    return names, codes


_HEX = re.compile(r"#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})\b", re.IGNORECASE)
_BRACKETS = re.compile(r"[\[(]([\d\s,;]+)[\])]")


def _lines(text: str, place: Path) -> list[str]:
    """A file's lines; those of JSON as if they were written in lines."""
    if text.lstrip()[:1] not in ("{", "["):
        return [re.sub(r"^- +", "", line.strip()) for line in text.splitlines()]
    try:
        found = json.loads(text)
        if isinstance(found, list):
            return [name if isinstance(name, str) else _told_in(name) for name in found]
        return [
            f"{_plain(value)} {key}" if not isinstance(value, str) else f"{key} {value}"
            for key, value in found.items()
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{place}' is no list of classes in JSON: names, or names with values or colours"
        ) from error


def _told_in(record: dict[str, Any]) -> str:
    """A record of a class as a line."""
    keys = ("value", "id", "color", "colour", "rgb")
    return f"{_plain(next(record[key] for key in keys if key in record))} {record['name']}"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _row(line: str) -> tuple[list[int], str]:
    """The numbers of a line and its name.

    >>> _row("0: road"), _row("road:128,64,0::"), _row("(128, 64, 0) road"), _row("level 2: low")
    (([0], 'road'), ([128, 64, 0], 'road'), ([128, 64, 0], 'road'), ([], 'level 2: low'))
    """
    if (found := _HEX.search(line)) is not None:
        parts = [int(part, 16) for part in found.groups()]
    elif (found := _BRACKETS.search(line)) is not None:
        parts = [int(part) for part in re.findall(r"\d+", found[1])]
    if found is not None:
        return parts, (line[: found.start()] + line[found.end() :]).strip(" ,;:=\t\"'")
    fields = [field.strip(" \t\"'") for field in re.split("[,;:=]", line)]
    if "," in line or ";" in line or any(field.isdecimal() for field in fields):
        numbers = [int(field) for field in fields if field.isdecimal()]
        return numbers, " ".join(field for field in fields if field and not field.isdecimal())
    fields = line.split()
    if len(fields) > 3 and all(field.isdecimal() for field in fields[-3:]) and not fields[0].isdecimal():
        return [int(field) for field in fields[-3:]], " ".join(fields[:-3])
    count = next((i for i, field in enumerate(fields) if not field.isdecimal()), len(fields))
    return [int(field) for field in fields[:count]], " ".join(fields[count:])


def settle(
    names: Sequence[str] | None,
    codes: Mapping[int, int] | None,
    found: Sequence[Counts],
    places: Sequence[str],
    ignore: int | None = VOID,
) -> tuple[ClassTable, tuple[str, ...]]:
    """The table of a data set's masks, checked against every code in them, and what was decided.

    Args:
        names: of the classes; None where nobody says.
        codes: what the codes mean; None takes value i for class i.
        found: pixels by code, of every mask.
        places: of every mask, as errors call it.
        ignore: the value that is void where no class has it.

    Raises:
        UserError: a mask holds a code that means nothing, or there are too few or too many classes.
    """
    present = {code for counts in found for code in counts}
    notes: tuple[str, ...] = ()
    if names is not None and len(names) < 2:
        raise UserError(f"data.classes names {len(names)} class(es), segmentation needs 2 at least")
    if names is None:
        names, codes, notes = _counted(present, ignore, places, found)
    if len(names) > _MOST:
        raise UserError(f"{len(names)} classes: masks can tell {_MOST} at most")
    if codes is None:
        codes = {i: i for i in range(len(names))}
        if len(names) == 2 and 255 in present and present <= {0, 255}:
            codes = {0: 0, 255: 1}
            notes += (f"binary masks: 0 is '{names[0]}', 255 is '{names[1]}', nothing is void",)
    if ignore is not None:
        if codes.get(ignore, VOID) != VOID:
            notes += (_claimed(ignore, names[codes[ignore]]),)
        codes = {ignore: VOID, **codes}
    _check_codes(names, codes, found, places)
    return ClassTable(tuple(names), codes), notes


def _claimed(ignore: int, name: str) -> str:
    """A note that a class has the usual value of void; another was said to be void by somebody."""
    if ignore != VOID:
        raise UserError(
            f"data.ignore_index={ignore} is the value of the class '{name}' too; data.classes=FILE of "
            "'value name' lines says which values the classes have"
        )
    return f"the value {ignore} is the class '{name}', not void"


def _counted(
    present: set[int], ignore: int | None, places: Sequence[str], found: Sequence[Counts]
) -> tuple[tuple[str, ...], dict[int, int], tuple[str, ...]]:
    """Classes where nobody names any, the values: their names, codes, and what is to be said."""
    colours = sorted(code for code in present if is_colour(code))
    if colours:
        where = next(place for place, counts in zip(places, found, strict=True) if colours[0] in counts)
        shown = ", ".join(map(code_name, colours[:3]))
        raise UserError(
            f"masks are coloured ('{where}': {shown}, ...): data.classes=FILE says what each colour means, "
            "one 'red green blue name' a line"
        )
    if present <= {0, 255}:
        raise UserError(
            "masks hold the values 0 and 255 alone; name both: data.classes=[background,object]"
            if 255 in present
            else "masks hold the value 0 alone: there is nothing to tell apart"
        )
    highest = max((code for code in present if code != ignore), default=0)
    values = [value for value in range(min(highest, _MOST) + 1) if value != ignore]
    gaps = [str(value) for value in values if value not in present]
    if highest >= _MOST or len(gaps) > max(_MOST_GAPS, len(values) - len(gaps)):
        some = quoted([str(value) for value in sorted(present - {ignore})], 6)
        raise UserError(
            f"masks hold values up to {highest} with gaps ({some}): data.classes=FILE says what they mean, "
            "one 'value name' a line; data.ignore_index=VALUE which of them is void"
        )
    told = f"no class names: values 0 to {highest} are the classes" + f", but for {ignore}" * (
        ignore is not None and ignore < highest
    )
    way = "data.ignore_index=0" if 255 not in present else "data.classes=[void,NAME,...]"
    way = f"; {way} counts the classes from 1" * (gaps == ["0"])
    notes = (told,) + ((f"no mask holds the value {', '.join(gaps)}{way}",) if gaps else ())
    return tuple(map(str, values)), {value: i for i, value in enumerate(values)}, notes


def _check_codes(
    names: Sequence[str], codes: Mapping[int, int], found: Sequence[Counts], places: Sequence[str]
) -> None:
    """Refuses the first mask with a code that means nothing."""
    present = {code for counts in found for code in counts}
    two = codes == {0: 0, 1: 1, 255: VOID} and {0, 255} <= present and 1 not in present
    binary = "; masks of 0 and 255 must hold no other value, as resized ones do" * two
    for place, counts in zip(places, found, strict=True):
        for code, pixels in counts.items():
            if code in codes:
                continue
            coloured = is_colour(code)
            classes = [c for c, label in codes.items() if label != VOID and is_colour(c) == coloured]
            known = quoted([code_name(c) for c in classes])
            if coloured and not known:
                raise UserError(
                    f"mask '{place}' is coloured ({code_name(code)} in {pixels} pixels), but the classes "
                    "have no colours; give a file of 'red green blue name' lines: data.classes=FILE"
                )
            what = "colour" if coloured else "value"
            from_one = "; where classes begin at 1, put void first among the names" * (code == len(names))
            raise UserError(
                f"mask '{place}' holds the {what} {code_name(code)} in {pixels} pixels, which is none of the "
                f"{len(names)} classes ({known or 'all of them colours'}) and not void; data.classes=FILE "
                f"says what {what}s mean, data.ignore_index=VALUE which is void" + binary + from_one
            )
