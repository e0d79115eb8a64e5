"""Finished runs of several methods as one comparison: means, deviations, paired differences, curves."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from statistics import mean, stdev
from typing import Any

from rich.table import Table
from scipy.stats import t as student_t

from diffkd.report.classes import class_tables, per_class
from diffkd.report.similarity import Similarity
from diffkd.report.summary import percent, quantity
from diffkd.runs.folder import History

CONFIDENCE = 0.95


@dataclass(frozen=True)
class FinishedRun:
    """One method at one seed.

    Attributes:
        method: as the user wrote it: `kd`, or `diffkd+dkd`.
        seed: of the run.
        summary, history: what the run folder says.
        similarity: of student's and teacher's features; empty where it was not measured.
    """

    method: str
    seed: int
    summary: Mapping[str, Any]
    history: History
    similarity: Similarity


def compare_runs(
    title: str,
    runs: Sequence[FinishedRun],
    notes: Sequence[str] = (),
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """All figures of a comparison as plain values; scores are shares (0 to 1).

    Args:
        title: of the comparison.
        runs: at least one of every method.
        notes: what the runs had to say, one line each.
        tuned: what trials have chosen, by method, as plain values.
    """
    first = runs[0].summary
    names = list(dict.fromkeys(run.method for run in runs))
    of = {name: [run for run in runs if run.method == name] for name in names}
    taught = next((run.summary for run in runs if run.summary["teacher"]), None)
    return {
        "title": title,
        "metric_label": first["metric_label"],
        "higher_is_better": first["higher_is_better"],
        "date": date.today().isoformat(),
        "machine": first["machine"],
        "epochs": first["epochs"],
        "steps": first.get("steps"),
        "axis": first.get("axis", "epoch"),
        "seeds": sorted({run.seed for run in runs}),
        "teacher": None if taught is None else _teacher(taught),
        "student": first["student"],
        "notes": list(notes),
        "methods": [_method(name, of[name], of) | {"tuned": (tuned or {}).get(name)} for name in names],
        "per_class": list(per_class(of)),
    }


def _teacher(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher and its score; of several the first, whose name says the others too."""
    metric, first = summary["metric"], summary["teacher"]
    others = [
        each["model"] + (f" ({percent(each[metric])})" if metric in each else "")
        for each in summary.get("teachers", {}).values()
    ]
    model = " and ".join((*others, first["model"]))
    return {**first, "model": model, "score": first.get(metric)}


def _method(
    name: str, runs: Sequence[FinishedRun], of: Mapping[str, Sequence[FinishedRun]]
) -> dict[str, Any]:
    first = runs[0].summary
    metric, watched = first["metric"], first["figures"]
    columns = dict.fromkeys(key for row in runs[0].history for key in row)
    losses = [k for k in columns if k.split(".")[0] in ("task", *first["methods"]) and k not in watched]
    return {
        "name": name,
        "weights": dict(first.get("weights", {})),
        "seeds": [run.seed for run in runs],
        "last": _spread([run.summary["last"][metric] for run in runs]),
        "best": _spread([run.summary["best"][metric] for run in runs]),
        "to_none": _difference(runs, of.get("none", ())) if name != "none" else None,
        "to_kd": _difference(runs, of.get("kd", ())) if name != "kd" else None,
        "images_per_second": mean(run.summary["images_per_second"] for run in runs),
        "memory_mb": max(run.summary["memory_mb"] for run in runs),
        "extra_parameters": first["extra_parameters"],
        "seconds": mean(run.summary["seconds"] for run in runs),
        "curve": _curve(runs, metric, band=True),
        "losses": {key: _curve(runs, key) for key in losses},
        "figures": {key: _curve(runs, key) for key in watched},
        "similarity": _mean_similarity(runs),
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "values": values}


def _difference(ours: Sequence[FinishedRun], theirs: Sequence[FinishedRun]) -> dict[str, float | None] | None:
    """Mean of the differences at the seeds that both have, and its 95 % interval by Student's t."""
    score = {run.seed: run.summary["last"][run.summary["metric"]] for run in theirs}
    gains = [
        run.summary["last"][run.summary["metric"]] - score[run.seed] for run in ours if run.seed in score
    ]
    if not gains:
        return None
    if len(gains) < 2:
        return {"mean": gains[0], "low": None, "high": None}
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, len(gains) - 1)) * stdev(gains) / math.sqrt(len(gains))
    return {"mean": mean(gains), "low": mean(gains) - half, "high": mean(gains) + half}


def _curve(runs: Sequence[FinishedRun], key: str, band: bool = False) -> dict[str, list[float]]:
    """Mean over the runs at each place that all have; the band is one standard deviation each way.

    Places are steps where the runs count in them, else epochs.
    """
    axis = runs[0].summary.get("axis", "epoch")
    columns = [{row[axis]: row[key] for row in run.history if key in row} for run in runs]
    places = sorted(set.intersection(*(set(column) for column in columns)))
    at = [[column[place] for column in columns] for place in places]
    curve = {axis: places, "mean": [mean(values) for values in at]}
    if band:
        spread = [stdev(values) if len(values) > 1 else 0.0 for values in at]
        for side, sign in (("low", -1), ("high", 1)):
            curve[side] = [m + sign * s for m, s in zip(curve["mean"], spread, strict=True)]
    return curve


def _mean_similarity(runs: Sequence[FinishedRun]) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for name in runs[0].similarity:
        rows = [run.similarity[name] for run in runs if name in run.similarity]
        found[name] = {}
        for when in ("before", "after"):
            values = [row[when] for row in rows]
            known = [value for value in values if value is not None]
            found[name][when] = mean(known) if known else None
    return found


# --- as tables -------------------------------------------------------------------------------------

Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def _columns(comparison: Mapping[str, Any]) -> list[Column]:
    label = comparison["metric_label"]
    chosen: list[Column] = [
        ("options", lambda m: (m["tuned"] or {}).get("options", "")),
        ("held out", lambda m: percent(m["tuned"]["score"]) if m["tuned"] else ""),
    ]
    return [
        ("method", lambda m: m["name"]),
        ("weight", _weights),
        *(chosen if any(m.get("tuned") for m in comparison["methods"]) else []),
        (f"{label} last", lambda m: _plus_minus(m["last"])),
        (f"{label} best", lambda m: _plus_minus(m["best"])),
        ("to none", lambda m: _gain(m["to_none"])),
        ("to kd", lambda m: _gain(m["to_kd"])),
        ("images/s", lambda m: f"{m['images_per_second']:,.0f}"),
        ("memory", lambda m: f"{m['memory_mb']:,.0f} MB"),
        ("extra parameters", lambda m: quantity(m["extra_parameters"])),
    ]


def rich_table(comparison: Mapping[str, Any], *, narrow: bool = False) -> Table:
    """The table for a terminal.

    Args:
        comparison: as `compare_runs` gives it.
        narrow: it is whole at 80 characters: without what the report's own tables have besides.
    """
    note = "to none, to kd: mean of the paired differences, 95 % interval"
    columns = _columns(comparison)
    if narrow:
        kept = ("method", "to none", "to kd")
        columns = [
            (title, cell) for title, cell in columns if title in kept or title.endswith(("last", "best"))
        ]
        note += "; weights, speed and memory: table.md"
    table = Table(title=caption(comparison), caption=note, padding=(0, 1, 0, 0) if narrow else (0, 1))
    for title, _ in columns:
        name = title == "method"
        table.add_column(
            title.replace(" ", "\n") if narrow and not name else title,
            justify="left" if name else "right",
            overflow="fold" if name else "ellipsis",
            no_wrap=not name,
        )
    for method in comparison["methods"]:
        cells = [cell(method) for _, cell in columns]
        table.add_row(*([c.replace(" [", "\n[").replace(" ±", "\n±") for c in cells] if narrow else cells))
    return table


def markdown(comparison: Mapping[str, Any]) -> str:
    """The table in Markdown, with what it was measured on."""
    columns, axis = _columns(comparison), comparison.get("axis", "epoch")
    rows = [[title for title, _ in columns], ["---", *["---:"] * (len(columns) - 1)]]
    rows += [[cell(method) for _, cell in columns] for method in comparison["methods"]]
    lines = [caption(comparison), ""] + ["| " + " | ".join(row) + " |" for row in rows]
    lines += [
        "",
        "Mean ± standard deviation over the seeds; to none, to kd: mean of the paired differences "
        f"after the last {axis}, with its 95 % interval. The best {axis} is chosen on the test data, so it "
        f"flatters all. {comparison['machine']}, {comparison['date']}.",
    ]
    lines += class_tables(comparison.get("per_class", ()))
    return "\n".join(lines) + "\n"


def to_csv(comparison: Mapping[str, Any]) -> str:
    """One row a method, plain numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    spreads, gains = ("last", "best"), ("to_none", "to_kd")
    plain = ("images_per_second", "memory_mb", "extra_parameters", "seconds")
    writer.writerow(
        ["method", "seeds", *(f"{s}_{k}" for s in spreads for k in ("mean", "std"))]
        + [f"{g}_{k}" for g in gains for k in ("mean", "low", "high")]
        + [*plain, "weight", "chosen", "trials"]
    )
    for m in comparison["methods"]:
        row = [m["name"], len(m["seeds"]), *(m[s][k] for s in spreads for k in ("mean", "std"))]
        row += [(m[g] or {}).get(k) for g in gains for k in ("mean", "low", "high")]
        tuned = m.get("tuned") or {}
        writer.writerow(
            row + [m[key] for key in plain] + [_weights(m), tuned.get("shown"), tuned.get("trials")]
        )
    return text.getvalue()


def caption(comparison: Mapping[str, Any]) -> str:
    """What was compared, in one line."""
    teacher, student = comparison["teacher"], comparison["student"]
    score = f" ({percent(teacher['score'])})" if teacher and teacher["score"] is not None else ""
    taught = f"{teacher['model']}{score} -> " if teacher else ""
    count = len(comparison["seeds"])
    seeds = f"{count} seed{'s' * (count != 1)}"
    return f"{comparison['title']}: {taught}{student['model']}, {_length(comparison)}, {seeds}"


def _length(comparison: Mapping[str, Any]) -> str:
    if comparison.get("axis", "epoch") == "step":
        return f"{comparison['steps']:,} steps"
    return f"{comparison['epochs']} epochs"


def _weights(method: Mapping[str, Any]) -> str:
    """The weights of what is joined in a method, in its order."""
    return " + ".join(f"{weight:g}" for weight in method["weights"].values())


def _plus_minus(spread: Mapping[str, Any]) -> str:
    if spread["std"] is None:
        return percent(spread["mean"])
    return f"{100 * spread['mean']:.2f} ± {100 * spread['std']:.2f} %"


def _gain(gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return ""
    interval = "" if gain["low"] is None else f" [{100 * gain['low']:+.2f}, {100 * gain['high']:+.2f}]"
    return f"{100 * gain['mean']:+.2f}{interval}"
