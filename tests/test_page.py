"""The comparison's page: what it says, what it lets in, and that a browser draws all of it."""

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from diffkd.report.page import page

CHROMIUM = shutil.which("chromium")
HOSTILE = '</script><b onclick="x()">&\u2028\u2029{{data}}'
EPOCHS = list(range(1, 13))


def _stat(values: list[float]) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "std": 0.004, "values": values}


def _over_time(start: float, end: float) -> dict[str, Any]:
    return {"epoch": EPOCHS, "mean": [start + (end - start) * (1 - 0.7**epoch) for epoch in EPOCHS]}


def _difference(mean: float, half: float | None) -> dict[str, Any]:
    return {"mean": mean, "low": half and mean - half, "high": half and mean + half}


def _method(name: str, score: float, seeds: int = 3, half: float | None = 0.004) -> dict[str, Any]:
    curve = _over_time(0.3, score)
    last = _stat([score + 0.002 * (seed - (seeds - 1) / 2) for seed in range(seeds)])
    band = {"low": [y - 0.01 for y in curve["mean"]], "high": [y + 0.01 for y in curve["mean"]]}
    method = {
        "name": name,
        "seeds": list(range(seeds)),
        "last": last,
        "best": _stat([value + 0.003 for value in last["values"]]),
        "to_none": None if name == "none" else _difference(score - 0.95, half if seeds > 1 else None),
        "to_kd": _difference(score - 0.96, half) if name == "diffkd" and seeds > 1 else None,
        "images_per_second": 2100.0,
        "memory_mb": 953.0,
        "extra_parameters": 12345 if name == "diffkd" else 0,
        "seconds": 40.0,
        "curve": curve | band,
        "losses": {"task.cross_entropy": _over_time(1.5, 0.05)},
        "figures": {},
        "similarity": {"stage3": {"before": 0.71, "after": None}},
    }
    if name == "diffkd":
        method["losses"]["diffkd.stage3.kd"] = _over_time(0.4, 0.02)
        method["figures"] = {"diffkd.stage3.gamma": _over_time(0.5, 0.9)}
        method["similarity"]["stage3"]["after"] = 0.93
    return method


def _comparison(*methods: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "title": "digits",
        "metric_label": "top-1",
        "higher_is_better": True,
        "date": "2026-11-24",
        "machine": "Intel Xeon, 2 cores",
        "epochs": 12,
        "seeds": [0, 1, 2],
        "teacher": {
            "model": "simple/cnn16",
            "score": 0.9972,
            "parameters": 72666,
            "macs": 600000.0,
            "milliseconds": 0.18,
            "bytes": 293000,
        },
        "student": {
            "model": "simple/cnn3",
            "parameters": 2752,
            "macs": 22600.0,
            "milliseconds": 0.14,
            "bytes": 11400,
        },
        "notes": ["one picture is 0.28 points"],
        "methods": list(methods),
    } | changes


FULL = _comparison(_method("none", 0.95), _method("kd", 0.96), _method("diffkd", 0.975))


class _Page(HTMLParser):
    """Tags with their attributes, and the text within each kind of tag."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.text[tag] = self.text.get(tag, "") + data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def _data(source: str) -> Any:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', source, re.DOTALL)
    assert found
    return json.loads(found[1])


def _headline(*methods: dict[str, Any], **changes: Any) -> str:
    return _Page(page(_comparison(*methods, **changes))).text["h1"]


def test_page_stands_alone():
    source = page(FULL)
    assert _data(source) == FULL
    assert len(source.encode()) < 200_000
    assert set(re.findall(r"https?://[^\s\"'<>]*", source)) == {"http://www.w3.org/2000/svg"}
    tags = _Page(source).tags
    assert not [tag for tag, at in tags if "src" in at or "href" in at or tag in ("link", "img", "iframe")]
    assert "url(" not in source.split("<style>")[1].split("</style>")[0]
    assert not re.search(r"\{\{\w", source)


def test_names_cannot_become_markup():
    hostile = _comparison(
        _method("none", 0.95),
        _method(HOSTILE, 0.97),
        title=HOSTILE,
        machine=HOSTILE,
        notes=[HOSTILE],
        date=HOSTILE,
    )
    hostile["teacher"]["model"] = hostile["student"]["model"] = hostile["metric_label"] = HOSTILE
    source = page(hostile)
    assert _data(source) == hostile
    assert "onclick=" not in str(_Page(source).tags)
    for tag in ("script", "style", "h1", "main", "section"):
        assert _Page(source).count(tag) == _Page(page(FULL)).count(tag)
    assert "\u2028" not in source
    assert "\u2029" not in source
    assert _Page(source).text["h1"].startswith(HOSTILE)
    page(_comparison(title="\ud800", notes=["\udfff"])).encode()


def test_figures_that_are_not_finite_are_left_out():
    method = _method("kd", 0.96)
    method["curve"]["mean"][3] = float("nan")
    method["memory_mb"] = float("inf")
    shown = _data(page(_comparison(method)))["methods"][0]
    assert shown["curve"]["mean"][3] is None
    assert shown["memory_mb"] is None
    with pytest.raises(TypeError):
        page({"title": object()})


def test_headline_says_what_the_seeds_can_tell():
    none, best = _method("none", 0.95), _method("diffkd", 0.975)
    assert _headline(none, best) == "diffkd gains 2.50 points over training without distillation."
    unsure = "diffkd comes first, 2.50 points ahead of no distillation: no difference that {} can tell."
    assert _headline(none, _method("diffkd", 0.975, half=0.03)) == unsure.format("these seeds")
    assert _headline(_method("none", 0.95, 1), _method("diffkd", 0.975, 1)) == unsure.format("one seed")
    worse = "No method does better than training without distillation."
    assert _headline(none, _method("kd", 0.94)) == worse
    assert _headline(none, best, higher_is_better=False) == worse
    less = _method("kd", 0.93)
    assert _headline(none, less, higher_is_better=False).startswith("kd takes 2.00 points off")
    assert _headline() == "No method has a score yet."
    assert _headline(best | {"to_none": None}) == "diffkd reaches 97.50 % top-1."
    assert _headline(none) == "Training without distillation reaches 95.00 % top-1."
    behind = best | {"to_none": _difference(-0.02, 0.01)}
    assert "yet is 2.00 points worse" in _headline(none, behind)


def test_lead_and_footer_give_the_figures():
    text = _Page(page(FULL)).text
    assert "97.50 ± 0.40 %; without distillation 95.00 ± 0.40 %. Difference +2.50 points" in text["p"]
    assert "95 % interval 2.10 to 2.90. To plain kd +1.50 points" in text["p"]
    for part in ("same data order", "0, 1, 2", "24 November 2026", "so it flatters", "one picture"):
        assert part in text["footer"]


def _browse(folder: Path, source: str, act: str = "") -> _Page:
    """The page as the browser has drawn it, after `act` has run in it; a screenshot stays in the folder."""
    place = folder / "report.html"
    place.write_text(source.replace("</body>", f"<script>{act}</script></body>"), encoding="utf-8")
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += ["--virtual-time-budget=3000", "--enable-logging=stderr", "--v=0", "--window-size=1280,3200"]
    command += [f"--screenshot={folder / 'report.png'}", "--dump-dom", place.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    bad = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in bad if re.search("uncaught|error|refused", line, re.IGNORECASE)], bad
    drawn = _Page(done.stdout[done.stdout.index("<html") :])
    assert dict(drawn.tags)["body"]["data-errors"] == ""
    assert "NaN" not in str(drawn.tags)
    assert (folder / "report.png").stat().st_size > 10_000
    return drawn


def _sections(drawn: _Page) -> set[str]:
    return {str(at["id"]) for tag, at in drawn.tags if tag == "section" and "hidden" not in at}


browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to draw the page")


@browser
def test_browser_draws_every_section(tmp_path: Path):
    drawn = _browse(tmp_path, page(FULL))
    assert _sections(drawn) == {"sizes", "scores", "table", "curves", "losses", "figures", "similarity"}
    pictures = [at for tag, at in drawn.tags if tag == "svg"]
    assert all(at.get("role") == "img" for at in pictures)
    assert drawn.count("title") >= len(pictures) + 1
    swatches = sum("swatch" in (at.get("class") or "") for at in pictures)
    # four sizes, the dots, the curves, three panels of losses, one of gamma, one stage
    assert len(pictures) - swatches == 4 + 1 + 1 + 3 + 1 + 1
    assert sum(at.get("class") == "dot" for _, at in drawn.tags) == 9
    assert sum(at.get("class") == "series" for _, at in drawn.tags) == 3 + 4 + 1
    assert drawn.text["caption"].startswith("Top-1 as mean ± standard deviation")
    assert "97.50 ± 0.40" in drawn.text["tbody"]
    assert "2.10 to 2.90" in drawn.text["tbody"]


@browser
def test_browser_shows_hostile_names_as_text_and_runs_in_steps_as_such(tmp_path: Path):
    bad = '<img src=x onerror="document.body.dataset.owned=1"><svg onload=alert(1)>&amp;\'`${1}'
    methods = [_method(name, score) for name, score in (("none", 0.95), (bad, 0.97))]
    drawn = _browse(tmp_path, page(_comparison(*methods, title=bad, notes=[bad], axis="step", steps=24)))
    assert "data-owned" not in dict(drawn.tags)["body"]
    assert not any(tag == "img" or "onerror" in at or "onload" in at for tag, at in drawn.tags)
    assert bad in drawn.text["tbody"]
    assert bad in drawn.text["h1"]
    assert "last step" in drawn.text["thead"]
    assert "after the last step" in drawn.text["main"]


@browser
def test_browser_answers_clicks_and_pointer(tmp_path: Path):
    act = """
    const all = (query) => [...document.querySelectorAll(query)];
    const press = (query, text) => all(query).find((b) => b.textContent.includes(text)).click();
    press("#scores button", "Best"); press("#table button", "method"); press("#curves .legend button", "kd");
    const box = document.querySelector("#curves .chart").getBoundingClientRect();
    document.querySelector("#curves .chart").dispatchEvent(new PointerEvent("pointermove",
      { clientX: box.right - 8, clientY: box.top + 9 }));
    document.body.dataset.seen = all("tbody th span").map((name) => name.textContent) + "|"
      + document.querySelector("#tip").innerText.replaceAll("\\n", " ");
    """
    drawn = _browse(tmp_path, page(FULL), act)
    rows, tip = str(dict(drawn.tags)["body"]["data-seen"]).split("|")
    assert rows == "diffkd,kd,none"
    assert tip.startswith("epoch 12")
    assert sum(at.get("class") == "dot" for _, at in drawn.tags) == 9
    assert "97.80 ± 0.40" in drawn.text["svg"]
    assert sum(at.get("class") == "series" for _, at in drawn.tags) == 2 + 4 + 1


def _holes() -> dict[str, Any]:
    """A method without scores, one with gaps in its curve, one with missing epochs."""
    holed = copy.deepcopy(FULL)
    none, kd, diffkd = holed["methods"]
    none |= {
        "last": {"mean": None, "std": None, "values": [None]},
        "curve": None,
        "losses": None,
        "similarity": None,
    }
    kd |= {"curve": {"epoch": [1, 2, 9, 12], "mean": [0.4, 0.5, 0.9, 0.96]}, "best": None, "memory_mb": None}
    diffkd["curve"]["mean"][4] = diffkd["curve"]["low"][7] = None
    diffkd["losses"]["task.cross_entropy"]["mean"][2] = None
    diffkd["losses"]["diffkd.stage3.kd"]["mean"] = [0.0] * len(EPOCHS)
    holed["student"]["macs"] = holed["teacher"]["score"] = None
    return holed


def _crowd() -> dict[str, Any]:
    names = ["none", "kd", "diffkd", HOSTILE, "a_long_name" * 8, *(f"method{index}" for index in range(15))]
    return _comparison(*(_method(name, 0.95 + 0.001 * index) for index, name in enumerate(names)))


def _lonely() -> dict[str, Any]:
    method = _method("kd", 0.96, seeds=1) | {"figures": None, "similarity": None, "to_none": None}
    method["curve"] = {"epoch": [1], "mean": [0.96], "low": [None], "high": [None]}
    method["losses"] = {"task.cross_entropy": {"epoch": [1], "mean": [0.2]}}
    return _comparison(method, teacher=None, seeds=[0], notes=[], date=None, machine=None, epochs=1)


@browser
@pytest.mark.parametrize(
    ("comparison", "missing"),
    [
        pytest.param(_holes(), set(), id="holes"),
        pytest.param(_crowd(), set(), id="twenty methods"),
        pytest.param(_lonely(), {"figures", "similarity"}, id="one method, one seed, one epoch"),
        pytest.param({"title": "bare", "methods": []}, None, id="nothing"),
    ],
)
def test_browser_draws_what_there_is(tmp_path: Path, comparison: dict[str, Any], missing: set[str] | None):
    drawn = _browse(tmp_path, page(comparison))
    everything = {"sizes", "scores", "table", "curves", "losses", "figures", "similarity"}
    assert _sections(drawn) == (set() if missing is None else everything - missing)
    assert "undefined" not in drawn.text["main"]
