"""What the literature gives for a recipe's pair of models, beside what a run measured."""

from collections.abc import Iterator, Mapping
from typing import Any

from diffkd.report.summary import percent


def published_rows(
    summary: Mapping[str, Any], alone: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of who, its published figure and the measured one; none where nothing is published.

    Args:
        summary: of the run.
        alone: of the run of the same student without a teacher.

    >>> run = {"published": {"kd": 71.21}, "metric": "top1", "methods": ["diffkd"], "last": {"top1": 0.7}}
    >>> [row["published"] for row in published_rows(run | {"teacher": None})]
    ['not published for this pair', 0.7121]
    """
    published: dict[str, float] = summary.get("published") or {}
    if not published:
        return
    metric = summary["metric"]
    own = "+".join(summary["methods"]) or "none"
    measured = {own: summary["last"][metric]}
    if alone is not None:
        measured.setdefault("none", alone["last"][metric])
    if summary["teacher"] is not None and metric in summary["teacher"]:
        measured["teacher"] = summary["teacher"][metric]
    for name in dict.fromkeys([n for n in ("teacher", "none", own) if n in measured] + list(published)):
        found = published.get(name)
        yield {
            "": "student alone" if name == "none" else name,
            "published": "not published for this pair" if found is None else round(found / 100, 6),
            "measured here": measured.get(name),
        }


def published_line(summary: Mapping[str, Any], alone: Mapping[str, Any] | None = None) -> str | None:
    """The same in one line; None where nothing is published."""
    said = []
    for row in published_rows(summary, alone):
        who, known, ours = row.values()
        beside = f" (here {percent(ours)})" if ours is not None else ""
        said.append(f"{who} {known if isinstance(known, str) else percent(known)}{beside}")
    return f"published: {', '.join(said)}" if said else None
