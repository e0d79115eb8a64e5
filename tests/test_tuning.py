"""Trials that choose weights and options: how many, which, on what data, and after a kill."""

import json
import math
import signal
import sys
import time

import pytest

from conftest import start
from diffkd.errors import NotFiniteError, UserError
from diffkd.methods.base import Choice, Range, method_class
from diffkd.names import options_of, submodules
from diffkd.recipe.schema import MethodRecipe, load
from diffkd.report.tuning import Length, Search, trial_recipe

GUARDED = """
import json
from pathlib import Path
import diffkd
from diffkd.data.digits import build as digits
from diffkd.pictures.memory import ArraySplit

class Guarded(ArraySplit):
    '''Must not be asked before all trials are done.'''
    def batch(self, indices, seed):
        logs = [p.read_text() for p in Path("c/tuning").glob("*/study.log")]
        assert [log.count('"op_code":4') for log in logs] == [3], "the test data was read while tuning"
        Path("asked").touch()
        return super().batch(indices, seed)

def build(root=None):
    data = digits()
    test = Guarded(data.test.images, data.test.targets)
    return diffkd.Data(data.train, test, 10, (1, 8, 8), data.mean, data.std)
"""


class Trained:
    """Stands for training: the score is best at one weight and one temperature; it may be killed."""

    def __init__(self, killed_at=None, infinite_above=math.inf):
        self.killed_at, self.infinite_above, self.done = killed_at, infinite_above, []

    def __call__(self, run):
        if len(self.done) == self.killed_at:
            raise KeyboardInterrupt
        method = run.recipe.method["kd"]
        if method.weight > self.infinite_above:
            raise NotFiniteError("loss 'kd' is not finite at step 3")
        temperature = method.options.get("temperature", 4.0)
        score = 0.9 - abs(math.log10(method.weight / 0.05)) / 10 - abs(math.log10(temperature / 2)) / 50
        self.done.append((method.weight, temperature))
        figures = {"top1": score, "epoch": 1}
        summary = json.dumps({"metric": "top1", "metric_label": "top-1", "last": figures})
        run.folder.create("{}")
        for name in ("student", "checkpoints"):
            (run.folder.path / name).mkdir(exist_ok=True)
        (run.folder.path / "summary.json").write_text(summary)


@pytest.fixture
def base(tiny, monkeypatch):
    monkeypatch.setattr("diffkd.runs.folder._SUMMARY", ())
    return load(str(tiny), ["method=kd"])


def search(base, folder, trials=8, **method):
    recipe = base.model_copy(update={"method": {"kd": MethodRecipe(**method)}})
    return Search("kd", trial_recipe(recipe, Length(trials), 3), folder, Length(trials))


def went(found, trained):
    found.begin()
    found.work(trained, lambda _: None)
    return found.chosen()


def test_the_weight_is_tried_first_then_the_options_with_it(base, tmp_path):
    trained = Trained()
    chosen = went(search(base, tmp_path / "a"), trained)
    assert [round(w, 6) for w, _ in trained.done[:3]] == [0.9, 0.09, 9.0]
    assert all(t == 4.0 for _, t in trained.done[:5])
    assert any(t != 4.0 for _, t in trained.done[5:])
    assert len(trained.done) == 8
    assert all(0.009 <= w <= 90 and w == float(f"{w:.3g}") for w, _ in trained.done)
    assert chosen.score > chosen.first
    assert chosen.methods["kd"].weight == chosen.values["kd.weight"]
    assert not list((tmp_path / "a").glob("trial-*/student")), "a trial leaves its figures alone"
    assert len(list((tmp_path / "a").glob("trial-*/summary.json"))) == 8


@pytest.mark.parametrize("killed_at", [0, 2, 6])
def test_a_killed_search_goes_on_as_if_nothing_had_happened(killed_at, base, tmp_path):
    whole, first, second = Trained(), Trained(killed_at), Trained()
    expected = went(search(base, tmp_path / "whole"), whole)
    with pytest.raises(KeyboardInterrupt):
        went(search(base, tmp_path / "killed"), first)
    log = tmp_path / "killed/study.log"
    if log.is_file():
        with log.open("a") as file:
            file.write('{"op_code":4,"wor')  # killed while a line was written
    assert went(search(base, tmp_path / "killed"), second) == expected
    assert first.done + second.done == whole.done
    third = Trained()
    assert went(search(base, tmp_path / "killed"), third) == expected
    assert third.done == []
    went(search(base, tmp_path / "killed", trials=9), third)
    assert len(third.done) == 1


def test_losses_that_become_infinite_count_as_the_worst(base, tmp_path):
    chosen = went(search(base, tmp_path / "a", trials=4), Trained(infinite_above=0.5))
    assert chosen.first is None
    assert chosen.trials == 4
    assert chosen.values["kd.weight"] <= 0.5
    with pytest.raises(UserError, match="the losses of no trial stayed finite"):
        went(search(base, tmp_path / "b", trials=3), Trained(infinite_above=0))


def test_what_the_recipe_says_is_the_start_or_stays(base, tmp_path):
    trained = Trained()
    went(search(base, tmp_path / "a", trials=7, weight=0.2, temperature=1.0), trained)
    assert trained.done[0][0] == 0.2
    assert {t for _, t in trained.done} == {1.0}
    assert set(search(base, tmp_path / "b", weight="auto").space) == {"kd.temperature"}
    assert search(base, tmp_path / "c", weight="auto", temperature=1.0).space == {}


def test_trials_of_another_recipe_are_refused(base, tmp_path):
    search(base, tmp_path / "a").begin()
    other = load(str(tmp_path / "tiny.yaml"), ["optimizer.lr=0.5", "method=kd"])
    with pytest.raises(
        UserError, match=r"another recipe: optimizer.lr is 0.02 there and 0.5 here; set output="
    ):
        search(other, tmp_path / "a")


def test_shorter_trials_shrink_their_schedule_and_keep_the_teacher_as_it_is():
    recipe = load("cifar100/resnet56-resnet20", ["teacher.train.epochs=7", "data.root=."])
    trial = trial_recipe(recipe, Length(3, epochs=recipe.trainer.epochs // 10), 5)
    assert trial.trainer.epochs == recipe.trainer.epochs // 10
    assert trial.schedule.milestones == pytest.approx([m / 10 for m in recipe.schedule.milestones])
    assert trial.teacher_recipe().schedule == recipe.teacher_recipe().schedule
    assert trial.teacher_recipe().trainer.epochs == 7
    assert (trial.seed, trial.data.test_on, trial.data.val_fraction) == (5, "val", 0.1)
    with pytest.raises(UserError, match="tune_steps=10: the final runs have another unit than steps"):
        trial_recipe(recipe, Length(3, steps=10), 5)


def test_options_to_search_are_options_of_their_methods():
    for name in submodules("diffkd.methods"):
        method = method_class(name)
        known = options_of(method)
        for wanted in method.search:
            default = known[wanted.option].default
            if isinstance(wanted, Range):
                assert default is None or wanted.low <= default <= wanted.high, name
            else:
                assert isinstance(wanted, Choice)
                assert default in wanted.values, name


def test_tuned_runs_use_what_was_chosen_and_the_test_data_is_not_read_before(diffkd, tiny, tmp_path):
    (tmp_path / "guarded.py").write_text(GUARDED)
    words = ["compare", "tiny.yaml", "methods=none,kd", "seeds=1", "output=c", "trainer.epochs=2"]
    words += ["data.name=guarded.py:build", "tune=3", "tune_epochs=1", "tune_fraction=0.25"]
    status, out, err = diffkd(*words)
    assert status == 0, err
    assert (tmp_path / "asked").exists()
    assert "kd, trial 3 of 3: top-1" in out
    comparison = json.loads((tmp_path / "c/comparison.json").read_text())
    none, kd = comparison["methods"]
    assert none["tuned"] is None
    assert kd["tuned"]["trials"] == 3
    assert kd["weights"] == {"kd": kd["tuned"]["values"]["kd.weight"]}
    assert (
        load(str(tmp_path / "c/kd-seed0/recipe.yaml"), trust=True).method["kd"].weight == kd["weights"]["kd"]
    )
    assert any("3 trials of 1 epochs" in note and "25 %" in note for note in comparison["notes"])
    table = (tmp_path / "c/table.md").read_text()
    assert "| held out |" in table
    assert f"| {kd['weights']['kd']:g} |" in table
    assert '"tuned":{"values"' in (tmp_path / "c/report.html").read_text()
    trial = load(str(tmp_path / "c/tuning/kd/trial-001/recipe.yaml"), trust=True)
    assert (trial.seed, trial.trainer.epochs, trial.data.test_on) == (1, 1, "val")
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("c/**/summary.json")}
    assert diffkd(*words)[0] == 0
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}


def test_killed_while_tuning_it_chooses_the_same(diffkd, tiny, tmp_path):
    words = ["compare", str(tiny), "methods=kd", "seeds=1", "trainer.epochs=1", "tune=2"]
    process = start(*words, "output=c", "jobs=2", cwd=tmp_path)
    log = tmp_path / "c/tuning/kd/study.log"
    for _ in range(3000):
        if (log.is_file() and '"op_code":4' in log.read_text()) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    outcomes = []
    for folder in ("c", "d"):
        status, _, err = diffkd(*words, f"output={folder}")
        assert status == 0, err
        content = json.loads((tmp_path / folder / "comparison.json").read_text())
        outcomes.append([(m["tuned"], m["last"]) for m in content["methods"]])
    assert outcomes[0] == outcomes[1]


MISTAKES = {
    "none": (["tune=0"], "tune=0: needs a whole number of at least 1"),
    "length alone": (["tune_epochs=1"], "tune_epochs=1 is about trials; add tune=20, say"),
    "too long": (["tune=2", "tune_epochs=9"], "tune_epochs=9: the final runs have 2 epochs"),
    "share": (["tune=2", "tune_fraction=2"], "tune_fraction=2: needs a share between 0 and 1"),
    "no library": (["tune=2"], "tune=2 needs a library: pip install 'diffkd[tune]'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_run(mistake, tiny, diffkd, tmp_path, monkeypatch):
    words, said = MISTAKES[mistake]
    if mistake == "no library":
        monkeypatch.setitem(sys.modules, "optuna", None)
    status, _, err = diffkd("compare", "tiny.yaml", "output=c", *words)
    assert (status, err.count("\n")) == (2, 1)
    assert said in err
    assert not (tmp_path / "c").exists()
