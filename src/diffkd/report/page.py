"""The page of a comparison: one HTML file that needs nothing but itself."""

import datetime
import html
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("page.html")
UNSAFE = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def page(comparison: dict[str, Any], sections: str = "", what: str = "diffkd compare") -> str:
    """The whole page of a comparison, as HTML to be written as UTF-8.

    Figures that are not finite are left out, as None is. Names and notes are shown as text, always.

    Args:
        comparison: title, metric, teacher, student, notes and methods of a comparison; scores and differences
            are shares (0 to 1), a difference is the method's score less the other's, whichever way is better.
        sections: further ones as HTML.
        what: the command that the page is of.

    Raises:
        TypeError: the comparison holds something that JSON has no word for.

    >>> shown = page({"title": "</title>a & b", "methods": []})
    >>> "<h1>No method has a score yet.</h1>" in shown, "<title>&lt;/title&gt;a &amp; b" in shown
    (True, True)
    """
    comparison = _finite(comparison)
    headline, lead = _verdict(comparison)
    parts = {
        "what": text(what),
        "title": text(comparison.get("title") or "Comparison"),
        "facts": text("  ·  ".join(_facts(comparison))),
        "headline": text(headline),
        "lead": lead,
        "sections": sections,
        "made": "\n".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in _made(comparison)),
        "data": json.dumps(comparison, allow_nan=False, separators=(",", ":")).translate(UNSAFE),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _verdict(comparison: dict[str, Any]) -> tuple[str, str]:
    """The result in one sentence, and the figures behind it as HTML."""
    label = comparison.get("metric_label") or "score"
    sign = -1 if comparison.get("higher_is_better") is False else 1
    methods = [method for method in comparison.get("methods") or [] if _mean(method.get("last")) is not None]
    if not methods:
        return "No method has a score yet.", ""
    ranked = sorted(methods, key=lambda method: -sign * method["last"]["mean"])
    best, plain = ranked[0], next((method for method in ranked if method["name"] == "none"), None)
    name, score = best["name"], f"{_percent(best['last']['mean'])} % {label}"
    lead = f"{text(_upper(label))} after the last {_axis(comparison)}: {_score(best)}"
    if best is plain:
        if len(ranked) == 1:
            return f"Training without distillation reaches {score}.", f"{lead}."
        lead += f" without distillation. Next is {text(ranked[1]['name'])} with {_score(ranked[1])}."
        lead += _gap("Difference", ranked[1], "to_none")
        return "No method does better than training without distillation.", lead
    if _mean(best.get("to_none")) is None:
        lead += ". There is no run without distillation to compare with."
        return f"{name} {'reaches' if len(ranked) == 1 else 'comes first with'} {score}.", lead
    lead += f"; without distillation {_score(plain)}." if plain else "."
    lead += _gap("Difference", best, "to_none") + _gap("To plain kd", best, "to_kd")
    return _compared(name, best["to_none"], sign, len(best.get("seeds") or [])), lead


def _compared(name: str, difference: dict[str, Any], sign: int, seeds: int) -> str:
    """What the paired difference to plain training allows to say."""
    mean, low, high = difference["mean"], difference.get("low"), difference.get("high")
    ahead, points = sign * mean > 0, f"{_percent(abs(mean))} points"
    if low is None or high is None or low <= 0 <= high:
        who = "one seed" if seeds == 1 else "these seeds"
        way = "ahead of" if ahead else "behind"
        return f"{name} comes first, {points} {way} no distillation: no difference that {who} can tell."
    if ahead:
        what = f"gains {points} over" if sign > 0 else f"takes {points} off"
        return f"{name} {what} training without distillation."
    return f"{name} has the best mean, yet is {points} worse than no distillation, seed for seed."


def _gap(what: str, method: dict[str, Any], key: str) -> str:
    """A sentence on a paired difference, as HTML; nothing where there is none."""
    difference = method.get(key) or {}
    if difference.get("mean") is None:
        return ""
    shown = f" {what} <b>{_signed(difference['mean'])} points</b>"
    low, high = difference.get("low"), difference.get("high")
    if low is None or high is None:
        return f"{shown}, with no interval."
    return f"{shown}, 95 % interval <b>{_minus(_percent(low))} to {_minus(_percent(high))}</b>."


def _score(method: dict[str, Any]) -> str:
    last = method["last"]
    spread = len(last.get("values") or []) > 1 and last.get("std") is not None
    return f"<b>{_percent(last['mean'])}{' ± ' + _percent(last['std']) if spread else ''} %</b>"


def _axis(comparison: dict[str, Any]) -> str:
    """What the runs count in, `epoch` or `step`."""
    return str(comparison.get("axis") or "epoch")


def _facts(comparison: dict[str, Any]) -> Iterator[str]:
    """How much was compared: methods, seeds, epochs."""
    axis = _axis(comparison)
    counts = [len(comparison.get(key) or []) for key in ("methods", "seeds")] + [
        comparison.get(f"{axis}s") or 0
    ]
    for count, what in zip(counts, ("method", "seed", axis), strict=True):
        if count:
            yield f"{count:,} {what}{'' if count == 1 else 's'}"


def _made(comparison: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """How it was made, and what its words mean."""
    yield "Equal terms", "Same student start, same data order, same schedule for every method at a seed."
    axis = _axis(comparison)
    facts = {
        "Seeds": ", ".join(map(str, comparison.get("seeds") or [])),
        f"{axis.capitalize()}s": comparison.get(f"{axis}s"),
        "Date": _day(comparison.get("date") or ""),
        "Machine": comparison.get("machine"),
    }
    yield from ((name, str(value)) for name, value in facts.items() if value)
    yield f"Last {axis}", f"The score after the last {axis}, with nothing chosen. This is the fair figure."
    yield f"Best {axis}", f"The best score of any {axis}. It is chosen on the test data, so it flatters."
    intervals = [(method.get("to_none") or {}).get("low") for method in comparison.get("methods") or []]
    if sum(low is not None for low in intervals) > 1:
        yield "Intervals", "Each 95 % interval stands alone; with many methods, one may clear zero by luck."
    yield from (("" if index else "Notes", note) for index, note in enumerate(comparison.get("notes") or []))


def _day(date: str) -> str:
    try:
        day = datetime.date.fromisoformat(date[:10])
    except ValueError:
        return date
    return f"{day.day} {day:%B} {day.year}"


def _mean(figure: dict[str, Any] | None) -> float | None:
    return (figure or {}).get("mean")


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _signed(value: float) -> str:
    return _minus(f"{100 * value:+.2f}")


def _minus(shown: str) -> str:
    """The sign that is as wide as a plus."""
    return shown.replace("-", "\u2212")


def _upper(label: str) -> str:
    return label if label[1:] != label[1:].lower() else label[:1].upper() + label[1:]  # mIoU stays mIoU


def _finite(value: Any) -> Any:
    """The same, None in place of nan and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text(value: object) -> str:
    """Text for HTML, in ASCII: half a surrogate pair has no UTF-8."""
    return html.escape(str(value)).encode("ascii", "xmlcharrefreplace").decode()
