"""A run's own page: how good its student is, where it errs, how it was made, what to do with it next."""

import base64
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diffkd.errors import UserError, first_line
from diffkd.report.comparison import FinishedRun, compare_runs
from diffkd.report.evaluation import FOLDER, LastEvaluation, measure, write_evaluation
from diffkd.report.page import page, text
from diffkd.report.published import published_rows
from diffkd.report.summary import percent
from diffkd.runs.disk import read_json, write_atomically
from diffkd.runs.folder import RunFolder
from diffkd.training.control import find_control

PAGE = "run.html"
_ROWS = 40  # of a table, above which the rest is left to its CSV
_PLAIN = ("pictures", "objects", "found", "false", "regions")


def finish_page(folder: RunFolder, last: LastEvaluation | None = None) -> Path:
    """Looks where a finished run's student errs on its test data, and writes its page.

    Whatever stands in the way of the former is said on the page: the run is whole.

    Args:
        folder: of the run.
        last: its last evaluation, where that was watched; else the student answers once more.
    """
    note = ""
    try:
        found = last and last.found(folder)
        write_evaluation(found or measure(folder, trust=True), folder.path / FOLDER)
    except Exception as error:
        first = first_line(error)
        note = f"Where the student errs could not be looked at: {first}"
    return write_run_page(folder, note)


def write_run_page(folder: RunFolder, note: str = "") -> Path:
    """Writes `run.html` from what lies in the run folder.

    Args:
        folder: of a finished run.
        note: said on the page.

    Raises:
        UserError: the run has not finished, or something in its folder is damaged.
    """
    summary = folder.read_summary()
    control = find_control(folder)
    runs = [_finished(folder, summary)]
    if control is not None:
        runs.append(_finished(control, control.read_summary()))
    shown = compare_runs(_title(summary), runs, [note] if note else [])
    sections = "\n".join(_sections(folder, summary, control))
    content = page(shown, sections, what="diffkd run")
    place = folder.path / PAGE
    write_atomically(place, lambda partial: partial.write_text(content, encoding="utf-8"))
    return place


def _finished(folder: RunFolder, summary: Mapping[str, Any]) -> FinishedRun:
    name = "+".join(summary["methods"]) or "none"
    return FinishedRun(name, summary["seed"], summary, folder.read_history(), {})


def _title(summary: Mapping[str, Any]) -> str:
    return f"{summary['recipe']}: {' + '.join(summary['methods']) or 'no distillation'}"


def _sections(folder: RunFolder, summary: Mapping[str, Any], control: RunFolder | None) -> Iterator[str]:
    measured = control.read_summary() if control is not None else None
    rows = list(published_rows(summary, measured))
    if rows:
        deck = "The figures that the literature gives for this pair of models, beside those of this run."
        yield _section("Published and measured", _table(rows), deck)
    yield from _errors(folder)
    yield from _elsewhere(folder)
    if (folder.path / "denoising" / "index.html").is_file():
        link = '<p><a href="denoising/index.html">The feature on its way through the denoising</a></p>'
        yield _section("Denoising", link)
    yield _section("Use the student", f"<pre>{text(chr(10).join(_commands(folder, summary)))}</pre>")
    recipe = text(folder.recipe_file.read_text(encoding="utf-8"))
    listed = " ".join(f'<a href="{name}">{name}</a>' for name in _files(folder))
    yield _section(
        "Settings",
        f"<pre>{recipe}</pre>",
        f"The resolved recipe: all that is needed to run it again. {listed}",
    )


def _files(folder: RunFolder) -> Iterator[str]:
    names = ("recipe.yaml", "metrics.csv", "summary.json", "log.txt", "curves.png", "student/config.json")
    yield from (name for name in names if (folder.path / name).is_file())


def _commands(folder: RunFolder, summary: Mapping[str, Any]) -> Iterator[str]:
    """What can be done next, as lines of a shell."""
    run = shlex.quote(str(folder.path))
    yield f"diffkd predict {run} PICTURES"
    yield f"diffkd evaluate {run} data.root=OTHER"
    yield f"diffkd export {run} to=onnx with_preparation=true"
    if "diffkd" in summary["methods"]:
        yield f"diffkd visualize {run} PICTURES"
    yield f"python -c \"import diffkd; print(diffkd.load_student('{folder.path}').class_names)\""


# --- where it errs ---------------------------------------------------------------------------------


def _errors(folder: RunFolder) -> Iterator[str]:
    place = folder.path / FOLDER
    if not (place / "figures.json").is_file():
        return
    try:
        told = read_json(place / "figures.json")
    except UserError:
        return
    inside = [_account(place, told), *_pictures(place, told)]
    for name, title in (("classes", "Each class"), ("sizes", "By size"), ("confused", "Taken for another")):
        rows = told.get(name) or []
        if rows:
            inside.append(f"<h3>{title}</h3>{_table(rows[:_ROWS])}")
            if len(rows) > _ROWS:
                inside.append(f"<p class='deck'>and {len(rows) - _ROWS} more in {name}.csv</p>")
    yield f'<section class="faults"><h2>Where it errs</h2>{"".join(inside)}</section>'


def _elsewhere(folder: RunFolder) -> Iterator[str]:
    """What `evaluate` found on other data, other splits or of the best epoch's student."""
    inside = []
    for place in sorted(folder.path.glob(f"{FOLDER}-*")):
        try:
            inside.append(f"<h3>{text(place.name)}</h3>{_account(place, read_json(place / 'figures.json'))}")
        except (UserError, KeyError, TypeError, AttributeError):
            continue  # half written, or not of ours
    if inside:
        yield f'<section class="faults"><h2>Looked at besides</h2>{"".join(inside)}</section>'


def _account(place: Path, told: Mapping[str, Any]) -> str:
    """What was looked at, its figures, and links to the files."""
    overrides = told.get("overrides") or []
    words = f" of the {told['split']} split" * (told.get("split", "test") != "test")
    words += ", with " + " ".join(overrides) if overrides else ""
    words += ", the best epoch's student" * (told.get("student") == "best")
    parts = [f"{told['pictures']:,} pictures{words}"]
    parts += [f"{name} {percent(value)}" for name, value in told["figures"].items()]
    links = " ".join(
        f'<a href="{quote(place.name)}/{file.name}">{file.name}</a>'
        for file in sorted(place.iterdir())
        if file.suffix in (".csv", ".json", ".png")
    )
    return f'<p class="deck">{text("; ".join(parts))}. {links}</p>'


def _pictures(place: Path, told: Mapping[str, Any]) -> Iterator[str]:
    """Confusion and reliability side by side, the worst pictures below."""
    panels = [
        f'<div class="panel"><h3>{title}</h3>{_image(place / name, title, width)}</div>'
        for name, title, width in (
            ("confusion.png", "Confusion", None),
            ("reliability.png", "Is it as sure as it is right?", 380),
        )
        if (place / name).is_file()
    ]
    yield f'<div class="panels wide">{"".join(panels)}</div>'
    if (place / "worst.png").is_file():
        title = "The errors that the student is surest of" if "reliability" in told else "The worst pictures"
        yield f'<h3>{title}</h3><div class="scroll">{_image(place / "worst.png", title)}</div>'


def _image(place: Path, title: str, width: int | None = None) -> str:
    """A picture that is part of the page."""
    source = base64.b64encode(place.read_bytes()).decode()
    size = f' width="{width}"' if width else ""
    return f'<img class="sheet" alt="{title}"{size} src="data:image/png;base64,{source}">'


def _section(title: str, inside: str, deck: str = "") -> str:
    told = f'<p class="deck">{deck}</p>' if deck else ""
    return f"<section><h2>{title}</h2>{told}{inside}</section>"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with a bar behind every share."""
    head = "".join(f"<th>{text(name)}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(_cell(name, value, i == 0) for i, (name, value) in enumerate(row.items())) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(name: str, value: Any, first: bool) -> str:
    if first:
        return f"<th>{text(value)}</th>"
    if value is None:
        return "<td></td>"
    if isinstance(value, str):
        return f"<td>{text(value)}</td>"
    if isinstance(value, int) or name in _PLAIN:
        return f"<td>{value:,}</td>"
    fill = f"linear-gradient(90deg,var(--wash) {100 * max(0.0, min(value, 1.0)):.1f}%,transparent 0)"
    return f'<td style="background:{fill}">{100 * value:.1f} %</td>'
