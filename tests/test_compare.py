"""Comparisons: figures, runs that are found again, mistakes, the report."""

import contextlib
import io
import json
import math
import signal
import time

import pytest

from conftest import TINY, start
from diffkd.report.compare import Wanted, compare
from diffkd.report.comparison import FinishedRun, compare_runs, markdown, to_csv
from diffkd.report.similarity import linear_cka
from processes import wait_until

METHODS = "methods=none,kd,diffkd"


def run(method, seed, last, gamma=None):
    row = {"epoch": 1.0, "task.cross_entropy": 2.0, "top1": last / 2}
    rows = [row, {**row, "epoch": 2.0, "top1": last}]
    if gamma is not None:
        rows = [{**r, f"{method}.map.kd": 1.0, f"{method}.map.gamma": gamma} for r in rows]
    summary = {
        "metric": "top1",
        "metric_label": "top-1",
        "higher_is_better": True,
        "machine": "a machine",
        "epochs": 2,
        "methods": [] if method == "none" else [method],
        "figures": [] if gamma is None else [f"{method}.map.gamma"],
        "last": {"top1": last},
        "best": {"top1": last, "epoch": 2},
        "teacher": None,
        "student": {"model": "a/b"},
        "images_per_second": 10.0,
        "memory_mb": 1.0,
        "extra_parameters": 0,
        "seconds": 1.0,
    }
    return FinishedRun(method, seed, summary, rows, {"map": {"before": 0.5, "after": gamma}})


def test_paired_differences_and_their_interval():
    none, ours = [0.5, 0.6, 0.7], [0.52, 0.65, 0.71]
    runs = [run("none", i, v) for i, v in enumerate(none)]
    runs += [run("diffkd", i, v, gamma=0.9) for i, v in enumerate(ours)]
    comparison = compare_runs("title", runs)
    plain, diffkd = comparison["methods"]
    gains = [0.02, 0.05, 0.01]
    centre = sum(gains) / 3
    spread = math.sqrt(sum((g - centre) ** 2 for g in gains) / 2)
    half = 4.302652729911275 * spread / math.sqrt(3)  # Student's t, two degrees of freedom, 97.5 %
    assert diffkd["to_none"] == pytest.approx({"mean": centre, "low": centre - half, "high": centre + half})
    assert plain["to_none"] is None
    assert diffkd["to_kd"] is None
    assert diffkd["last"]["mean"] == pytest.approx(sum(ours) / 3)
    assert diffkd["curve"]["mean"] == pytest.approx([sum(ours) / 6, sum(ours) / 3])
    assert diffkd["figures"]["diffkd.map.gamma"]["mean"] == pytest.approx([0.9, 0.9])
    assert set(diffkd["losses"]) == {"task.cross_entropy", "diffkd.map.kd"}
    assert diffkd["similarity"] == {"map": {"before": 0.5, "after": 0.9}}
    assert "+2.67 [" in markdown(comparison)
    assert to_csv(comparison).splitlines()[2].startswith("diffkd,3,0.626")


def test_one_seed_has_no_interval():
    comparison = compare_runs("title", [run("none", 0, 0.5), run("kd", 0, 0.6, gamma=0.1)])
    assert comparison["methods"][1]["to_none"] == {"mean": pytest.approx(0.1), "low": None, "high": None}
    assert "+10.00 |" in markdown(comparison)


def test_cka_of_unrelated_features_is_small():
    import torch

    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 500, 4, generator=generator)
    rotated = one @ torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    assert linear_cka(one, rotated) == pytest.approx(1)
    assert linear_cka(one, other) < 0.1


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison, and what it said."""
    place = tmp_path_factory.mktemp("compared")
    (place / "tiny.yaml").write_text(TINY)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(place)
        compare(Wanted.parse("tiny.yaml", [METHODS, "seeds=2", "output=c"]))
    return place / "c", said.getvalue()


def test_the_report_and_runs_found_again(compared, diffkd, monkeypatch):
    folder, out = compared
    monkeypatch.chdir(folder.parent)
    comparison = json.loads((folder / "comparison.json").read_text())
    assert [m["name"] for m in comparison["methods"]] == ["none", "kd", "diffkd"]
    assert comparison["methods"][2]["similarity"]["stage3"]["after"] is not None
    assert comparison["methods"][0]["similarity"]["stage3"]["after"] is None
    assert comparison["methods"][2]["extra_parameters"] > 0
    assert "kd, seed 1: top-1" in out
    assert "</html>" in (folder / "report.html").read_text()
    assert (folder / "table.md").read_text().count("\n| ") == 5
    assert (folder / "diffkd-seed0/curves.png").is_file()
    stamp = (folder / "kd-seed0/summary.json").stat().st_mtime_ns
    status, out, err = diffkd(
        "compare", "tiny.yaml", "methods=none,kd,diffkd,diffkd+kd", "seeds=2", "output=c"
    )
    assert status == 0, err
    assert "6 of 8 runs are there already" in out
    assert "diffkd+kd, seed 0" in out
    assert "kd, seed 1: top-1" in out.replace("diffkd+kd, seed 1", "kd, seed 1")
    assert (folder / "kd-seed0/summary.json").stat().st_mtime_ns == stamp


def test_methods_start_from_the_same_student_and_see_the_same_batches(tiny, tmp_path):
    import torch

    from diffkd.assembly import assemble
    from diffkd.maths.randomness import seed_everything
    from diffkd.recipe.schema import load

    states, batches = [], []
    for method in ("none", "kd", "diffkd"):
        recipe = load(str(tiny), [f"method={method}"])
        seed_everything(recipe.seed)
        parts = assemble(recipe, with_teacher=bool(recipe.method))
        states.append(parts.student.model.state_dict())
        batches.append(next(iter(parts.loader(parts.data.train, shuffle=True).epoch(3))).images)
    for state, images in zip(states, batches, strict=True):
        assert all(torch.equal(value, states[0][key]) for key, value in state.items())
        assert torch.equal(images, batches[0])


def test_side_by_side_gives_the_same_figures(compared, diffkd, monkeypatch):
    folder, _ = compared
    monkeypatch.chdir(folder.parent)
    status, _, err = diffkd("compare", "tiny.yaml", "methods=diffkd", "seeds=2", "jobs=2", "output=d")
    assert status == 0, err
    for name in ("diffkd-seed0", "diffkd-seed1"):
        ours, theirs = (
            json.loads((place / name / "summary.json").read_text())["last"]
            for place in (folder, folder.parent / "d")
        )
        assert ours == theirs


def test_killed_half_way_it_repeats_no_finished_run(tiny, tmp_path, diffkd):
    words = ["compare", tiny, METHODS, "seeds=1", "output=c"]
    process = start(*words, cwd=tmp_path, DIFFKD_CACHE=str(tmp_path / "cache"))
    finished = tmp_path / "c/kd-seed0/summary.json"
    assert wait_until(finished.exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stamp = finished.stat().st_mtime_ns
    status, out, err = diffkd(*words)
    assert status == 0, err
    assert "of 3 runs are there already" in out
    assert finished.stat().st_mtime_ns == stamp


def test_asked_to_stop_side_by_side_it_says_how_to_go_on_and_leaves_nobody_behind(tiny, tmp_path):
    words = ["compare", tiny, "methods=none,diffkd", "seeds=1", "jobs=2", "output=c", "trainer.epochs=5000"]
    process = start(*words, cwd=tmp_path)
    assert wait_until(lambda: list(tmp_path.glob("c/*/checkpoints/*.pt")), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "the same command goes on" in err
    rows = {place: place.stat().st_size for place in tmp_path.glob("c/*/metrics.csv")}
    time.sleep(1)  # an epoch takes a twentieth of it
    assert rows == {place: place.stat().st_size for place in rows}


def test_a_method_of_ones_own(tiny, tmp_path, diffkd):
    (tmp_path / "my_losses.py").write_text(
        "import torch.nn.functional as F\n"
        "from diffkd import Method\n"
        "class MyLoss(Method):\n"
        "    def __init__(self, setup, *, scale: float = 1.0):\n"
        "        super().__init__()\n"
        "        self.scale, self.names = scale, [p.name for p in setup.logits]\n"
        "    def forward(self, student, teacher, batch):\n"
        "        return {n: self.scale * F.mse_loss(student[n], teacher[n]) for n in self.names}\n"
    )
    status, _, err = diffkd("compare", "tiny.yaml", "methods=none,my_losses:MyLoss", "seeds=1", "output=c")
    assert status == 0, err
    assert "my_losses:MyLoss" in (tmp_path / "c/table.md").read_text()


MISTAKES = {
    "unknown method": (["methods=none,dikd"], "methods: 'dikd': unknown method 'dikd'; did you mean"),
    "no teacher": (["teacher=null"], "has no teacher: there is nothing to compare"),
    "no methods": (["methods="], "methods: name at least one"),
    "seeds": (["seeds=many"], "seeds=many: needs a number of seeds"),
    "no seeds": (["seeds=0"], "seeds=0: needs a whole number of at least 1"),
    "jobs": (["jobs=-1"], "jobs=-1: needs a whole number of at least 1"),
    "method": (["method=kd"], "write methods=... instead of method=kd"),
    "negative weight": (["method.kd.weight=-1"], "method.kd.weight: needs at least 0, or 'auto', got -1"),
    "cannot serve": (
        ["methods=kd", "taps={stage3: stage3}"],
        "methods: 'kd': method 'kd' needs class scores",
    ),
    "no feature": (["methods=fitnet", "taps={'': ''}"], "method 'fitnet' needs a feature map to distil"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_run(mistake, tiny, diffkd, tmp_path):
    words, said = MISTAKES[mistake]
    status, _, err = diffkd("compare", "tiny.yaml", "output=c", *words)
    assert status == 2
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_all_weights_zero(tiny, diffkd):
    status, _, err = diffkd("distill", "tiny.yaml", "method={diffkd: 0, kd: 0}", "output=a")
    assert (status, err.count("\n")) == (2, 1)
    assert "all weights are zero" in err


def test_a_run_of_another_recipe_is_not_compared(compared, diffkd, monkeypatch):
    monkeypatch.chdir(compared[0].parent)
    status, _, err = diffkd("compare", "tiny.yaml", METHODS, "seeds=2", "output=c", "optimizer.lr=0.5")
    assert (status, err.count("\n")) == (2, 1)
    assert "was made with another recipe: optimizer.lr is 0.02 there and 0.5 here" in err
