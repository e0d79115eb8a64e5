"""The page of a comparison: one HTML file that needs nothing but itself."""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("page.html")
UNSAFE = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def page(comparison: dict[str, Any]) -> str:
    """The whole page of a comparison, as HTML to be written as UTF-8.

    Figures that are not finite are left out, as None is. Names and notes are shown as text, whatever they hold.

    Args:
        comparison: title, metric, teacher, student, notes and methods of a comparison; scores and differences
            are shares (0 to 1) in the metric's own direction, a difference is the method's score less the other's.

    Raises:
        TypeError: the comparison holds something that JSON has no word for.

    >>> shown = page({"title": "</title>a & b", "methods": []})
    >>> "<title>&lt;/title&gt;a &amp; b" in shown
    True
    """
    parts = {
        "title": _ascii(html.escape(str(comparison.get("title") or "Comparison"))),
        "data": _embed(comparison),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(title|data)\}\}", lambda found: parts[found[1]], template)


def _embed(value: Any) -> str:
    """JSON that no parser of HTML takes for anything but text."""
    return json.dumps(_finite(value), allow_nan=False, separators=(",", ":")).translate(UNSAFE)


def _finite(value: Any) -> Any:
    """The same, None in place of nan and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ascii(text: str) -> str:
    """Character references for the rest: half a surrogate pair has no UTF-8."""
    return text.encode("ascii", "xmlcharrefreplace").decode()
