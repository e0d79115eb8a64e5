"""Builds the documentation site: `python docs/build.py`.

The pages of this folder are copied to `build/docs`, what comes of the code is written into them (every
method, setting, recipe and public name, the notebooks), and the site is built from there, strictly.
A line `<!-- generated: NAME -->` stands where something is written.
"""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import diffkd
from diffkd.methods.base import Method, Range, method_class
from diffkd.names import submodules
from diffkd.report.listing import listing
from diffkd.report.settings import Group, groups

ROOT = Path(__file__).resolve().parents[1]
STAGED = ROOT / "build/docs"
# Files outside of this folder that are pages of the site, and are linked from others.
OUTSIDE = {
    "benchmarks/DIFFKD.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
_MARK = re.compile(r"^<!-- generated: (\w+)(?: (\w+))? -->$", re.MULTILINE)
_SIGHTS = {"none": "", "last": "the last feature map", "all": "a feature map of each resolution"}


def stage(folder: Path = STAGED) -> Path:
    """Writes all pages, complete, to a folder, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for source, name in OUTSIDE.items():
        text = re.sub(r"\]\((\.\./)?docs/", "](", (ROOT / source).read_text(encoding="utf-8"))
        (folder / name).write_text(text, encoding="utf-8")
    for place in folder.glob("notebooks/*.ipynb"):
        place.with_suffix(".md").write_text("\n\n".join(notebook(place)), encoding="utf-8")
    for place in folder.glob("*.md"):
        text = place.read_text(encoding="utf-8")
        for source, name in OUTSIDE.items():
            text = text.replace(f"](../{source}", f"]({name}")
        text = _MARK.sub(lambda mark: "\n\n".join(PARTS[mark[1]](*filter(None, [mark[2]]))), text)
        place.write_text(text, encoding="utf-8")
    return folder


def table(head: str, rows: list[tuple[str, ...]]) -> str:
    """A table; a bar within a cell is kept."""
    lines = [tuple(head.split("|")), ("---",) * (head.count("|") + 1), *rows]
    return "\n".join(
        "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line) + " |" for line in lines
    )


def methods() -> Iterator[str]:
    """Every method: one table, and a section each from its docstring."""
    names = sorted(submodules("diffkd.methods"), key=lambda name: (name == "none", name != "diffkd", name))
    found = {name: method_class(name) for name in names}
    rows = [
        (f"[`{name}`](#{name})", _title(kind)[1], _sees(kind), f"{kind.weight:g}")
        for name, kind in found.items()
    ]
    yield table("method|paper|sees|weight", rows)
    for name, kind in found.items():
        yield from _method(name, kind)


def _method(name: str, kind: type[Method]) -> Iterator[str]:
    title, _ = _title(kind)
    yield f"## {name}: {title} {{ #{name} }}" if name != "none" else f"## {name} {{ #{name} }}"
    text = re.split(r"\n(?:Args|Raises|Attributes|Example):\n|\n>>> ", inspect.getdoc(kind) or "")[0]
    summary, *rest = text.strip().split("\n\n")
    yield f"*{' '.join(summary.split())}*"
    for part in rest:
        if part.startswith("Use it "):
            part = '!!! tip "When to use it"\n\n    ' + _linked(part).replace("\n", "\n    ")
        yield part if part.startswith("    ") else _linked(part)
    sees = f"Sees {_sees(kind)}. " if _sees(kind) else ""
    tried = ", ".join(
        f"`{one.option}` "
        + (
            f"{one.low:g} to {one.high:g}"
            if isinstance(one, Range)
            else f"of {', '.join(map(str, one.values))}"
        )
        for one in kind.search
    )
    tuned = f" Tried beside the weight by `tune=N`: {tried}." if tried else ""
    yield f"{sees}Weight beside the labels: {kind.weight:g}.{tuned}"
    for group in groups(name):
        if "method." in group.title:
            yield _settings(group)


def _title(kind: type[Method]) -> tuple[str, str]:
    """A method's name in words and its paper, as the first line of its file says."""
    first = (inspect.getdoc(inspect.getmodule(kind)) or "").splitlines()[0]
    found = re.fullmatch(r"(?:[\w-]+: )?(.*?)(?: \((.*)\))?\.?", first)
    assert found is not None
    return found[1], found[2] or ""


def _sees(kind: type[Method]) -> str:
    parts = [_SIGHTS[kind.stages], "class scores" if kind.uses_logits else ""]
    return "" if kind.__module__.endswith(".none") else " and ".join(filter(None, parts))


def _linked(text: str) -> str:
    """Numbers of arXiv as links; signs that Markdown would take for its own as they are."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([<*])", r"\\\1", part) for part in parts[::2]]
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", "".join(parts))


def settings() -> Iterator[str]:
    """Every section of a recipe, every kind of data and every task."""
    yield "## Sections of a recipe"
    yield from (part for group in groups() for part in _group(group, group.title))
    for room, title in (("data", "Kinds of data"), ("tasks", "Tasks")):
        yield f"## {title}"
        prefix = {"data": "data", "tasks": "task"}[room]
        for name in submodules(f"diffkd.{room}"):
            for group in (group for group in groups(name) if group.title == prefix):
                yield from _group(group, f"{prefix}={name}")


def _group(group: Group, title: str) -> Iterator[str]:
    yield f"### {title}"
    yield _linked(group.said)
    if group.settings:
        yield _settings(group)


def _settings(group: Group) -> str:
    """Two columns, for narrow screens."""
    rows = []
    for one in group.settings:
        default = f" = `{one.default}`" if one.default else ""
        rows.append((f"`{one.key}`<br>{one.kind}{default}", _linked(one.said)))
    return table("key, type = default|what it does", rows)


def recipes() -> Iterator[str]:
    """The recipes that come along, by what they are about, with the published figures."""
    lines = [line.split(maxsplit=1) for line in listing("recipes")]
    for what, several in groupby(lines, key=lambda line: line[0].partition("/")[0]):
        found = [(f"`{name}`", told[0] if told else "") for name, *told in several]
        yield f"### {what}"
        yield table("recipe|what it is", found)


def api() -> Iterator[str]:
    """Every public name."""
    for name in diffkd.__all__:
        if not name.startswith("_"):
            yield f"::: diffkd.{diffkd._HOMES[name]}.{name}"


def example(name: str) -> Iterator[str]:
    """A program of the folder `examples`."""
    yield f"```python\n{(ROOT / 'examples' / f'{name}.py').read_text(encoding='utf-8')}```"


def notebook(place: Path) -> Iterator[str]:
    """A notebook's cells and what they gave, as Markdown."""
    for cell in json.loads(place.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
        yield from filter(None, map(_output, cell.get("outputs", [])))
    yield f"[This page as a notebook]({place.name})"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f"![What the cell draws](data:image/png;base64,{picture})"
    text = "".join(output.get("text", data.get("text/plain", "")))
    text = re.sub(r"\x1b\[[\d;]*m", "", text)  # colours of a terminal
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


PARTS: dict[str, Callable[..., Iterator[str]]] = {
    "example": example,
    "methods": methods,
    "settings": settings,
    "recipes": recipes,
    "api": api,
}


def render(site: Path | None = None) -> None:
    """Builds the site of the pages that `stage` has written; a warning is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    command += ["--config-file", str(ROOT / "mkdocs.yml"), *(["--site-dir", str(site)] if site else [])]
    # Without the variable a notice on the generator's own future stands in front of everything.
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})


if __name__ == "__main__":
    stage()
    render()
