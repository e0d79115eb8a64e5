"""Figures of each class in a comparison: means over seeds, in the table and on the page, or nothing."""

import re
from types import SimpleNamespace

import pytest

from diffkd.report.classes import MOST_CLASSES, class_tables, per_class
from diffkd.report.comparison import compare_runs, markdown
from diffkd.report.page import page
from test_compare import run

NAMES = ["a|b", "<b>dog", "owl"]


def _run(iou, names=NAMES, **arrays):
    return SimpleNamespace(summary={"class_names": names, "arrays": {"iou": iou, **arrays}})


def test_means_over_the_seeds_of_what_is_known_of_each_class():
    confusion = [[1, 0, 0]] * 3
    of = {
        "none": [_run([0.2, None, None], confusion=confusion), _run([0.4, 0.5, None], confusion=confusion)],
        "kd": [_run([0.5, 0.25, None], confusion=confusion)],
    }
    (found,) = per_class(of)
    assert found["figure"] == "iou"
    assert found["methods"] == {"none": [pytest.approx(0.3), 0.5, None], "kd": [0.5, 0.25, None]}
    assert found["shown"] == [0, 1]
    lines = list(class_tables([found]))
    assert "| a\\|b | 30.00 | 50.00 |" in lines
    assert not any("owl" in line for line in lines)


def test_of_many_classes_those_that_differ_most_are_shown():
    names = [f"class{i}" for i in range(100)]
    gains = [0.004 * (i % 50) for i in range(100)]
    of = {"none": [_run([0.5] * 100, names)], "kd": [_run([0.5 + gain for gain in gains], names)]}
    (found,) = per_class(of)
    assert len(found["shown"]) == MOST_CLASSES
    assert found["shown"] == [i for i in range(100) if i % 50 >= 35]


@pytest.mark.parametrize("arrays", [{}, {"by_size": [0.1, 0.2]}, {"words": ["a", "b", "c"]}, {"one": 0.5}])
def test_nothing_where_there_is_nothing_of_the_kind(arrays):
    runs = [SimpleNamespace(summary={"class_names": NAMES, "arrays": arrays})]
    assert not list(per_class({"none": runs}))
    assert not list(per_class({"none": [_run([0.1, 0.2], [])]}))


def test_they_stand_in_table_and_page():
    runs = [run("none", 0, 0.5), run("kd", 0, 0.6)]
    bare = compare_runs("title", runs)
    assert bare["per_class"] == []
    assert markdown(bare).count("\n| ") == 4
    for each, value in zip(runs, (0.25, 0.75), strict=True):
        each.summary.update(class_names=NAMES, arrays={"iou": [value, 0.5, None]})
    comparison = compare_runs("title", runs)
    assert "| a\\|b | 25.00 | 75.00 |" in markdown(comparison)
    source = page(comparison)
    assert "<b>dog" not in source
    data = re.search(r'<script id="data"[^>]*>(.*?)</script>', source, re.DOTALL)[1]
    assert '"per_class":[{"figure":"iou"' in data
