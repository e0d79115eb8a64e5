"""A run's length in steps: what is evaluated when, the rate at every step, resume on other processes."""

import math
import signal
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from conftest import start
from diffkd.errors import UserError
from diffkd.recipe.schema import load
from diffkd.recipe.training import CosineSchedule, PolySchedule, StepSchedule, TrainerRecipe
from diffkd.runs.console import Reporter
from diffkd.runs.folder import RunFolder
from diffkd.training.fit import fit
from diffkd.training.interrupt import InterruptedRunError
from diffkd.training.length import Length
from diffkd.training.optim import lr_factor

# Five steps an epoch; no statistics of a batch and no noise, so that any split of a batch learns alike.
PLAIN = ["student=smooth.py:smooth", "method=none", "teacher=null", "data.batch_size=256"]


def rows_of(length):
    return [step for step in range(1, length.last + 1) if length.evaluates(step)]


def test_steps_and_epochs_say_the_same_lengths():
    by_epochs = Length.of(TrainerRecipe(epochs=4), 10)
    by_steps = Length.of(TrainerRecipe(steps=40, eval_every=10), 10)
    assert replace(by_steps, unit="epoch") == by_epochs


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"epochs": 3}, [10, 20, 30]),
        ({"epochs": 3, "eval_epochs": 2}, [20, 30]),
        ({"epochs": 3, "eval_every": 12}, [12, 24, 30]),
        ({"steps": 25, "eval_every": 10}, [10, 20, 25]),
        ({"steps": 25, "eval_epochs": 1}, [10, 20, 25]),
        ({"steps": 60}, list(range(3, 61, 3))),
        ({"epochs": 3, "max_steps": 13}, [10, 13]),
    ],
)
def test_evaluations_come_when_they_are_asked_for_and_at_the_end(words, expected):
    assert rows_of(Length.of(TrainerRecipe(**words), 10)) == expected


def test_a_trial_cut_leaves_the_schedule_as_it_was():
    whole, cut = (Length.of(TrainerRecipe(steps=100, max_steps=most), 7) for most in (None, 10))
    for schedule in (CosineSchedule(warmup_steps=5), PolySchedule(), StepSchedule(every=2)):
        assert [lr_factor(schedule, s, whole) for s in range(10)] == [
            lr_factor(schedule, s, cut) for s in range(10)
        ]


def test_schedules_by_step_have_the_values_of_their_formulas():
    length = Length.of(TrainerRecipe(steps=200), 30)
    for step in range(200):
        assert lr_factor(PolySchedule(power=0.9), step, length) == pytest.approx((1 - step / 200) ** 0.9)
        wave = lr_factor(CosineSchedule(warmup_steps=20, final_factor=0.1), step, length)
        turn = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 20) / 180))
        assert wave == pytest.approx(step / 20 if step < 20 else turn)
        shares = lr_factor(StepSchedule(milestones=[0.5, 0.75], unit="share"), step, length)
        steps = lr_factor(StepSchedule(milestones=[100, 150], unit="steps"), step, length)
        assert shares == steps == pytest.approx(0.1 ** ((step >= 100) + (step >= 150)))
    epochs = StepSchedule(milestones=[2, 3])
    assert [lr_factor(epochs, s, length) for s in (59, 60, 90)] == pytest.approx([1, 0.1, 0.01])


def test_one_length_stands(tiny):
    steps = load(str(tiny), ["trainer.steps=40"]).trainer
    assert (steps.epochs, steps.steps) == (None, 40)
    assert load(str(tiny), ["method=none"]).trainer.epochs == 2
    made = load(str(tiny), ["trainer.steps=40", "teacher.train.epochs=3"]).teacher_recipe().trainer
    assert (made.epochs, made.steps) == (3, None)
    assert load(str(tiny), ["trainer.steps=40"]).teacher_recipe().trainer.steps == 40
    for words in ("trainer={epochs: 2, steps: 3}", "teacher.train={epochs: 2, steps: 3}"):
        with pytest.raises(UserError, match="either epochs or steps"):
            load(str(tiny), [words])
    with pytest.raises(UserError, match="either eval_every"):
        load(str(tiny), ["trainer={eval_every: 2, eval_epochs: 3}"])
    with pytest.raises(UserError, match="either warmup_epochs or warmup_steps"):
        load(str(tiny), ["schedule={warmup_epochs: 2, warmup_steps: 3}"])


def test_a_run_in_steps_counts_in_steps(tiny, tmp_path):
    words = ["trainer.steps=13", "trainer.eval_every=4", "trainer.save_every=3", f"output={tmp_path / 'a'}"]
    folder = fit(load(str(tiny), ["method=none", *words]), Reporter(quiet=True))
    history, summary = folder.read_history(), folder.read_summary()
    assert [row["step"] for row in history] == [4, 8, 12, 13]
    assert [row["epoch"] for row in history] == [0.8, 1.6, 2.4, 2.6]
    assert (summary["axis"], summary["steps"], summary["epochs"]) == ("step", 13, 2.6)
    assert summary["best"]["step"] in (4, 8, 12, 13)
    again = load(str(folder.recipe_file)).trainer
    assert (again.epochs, again.steps, again.eval_every) == (None, 13, 4)


# A model that asks its process to stop in its STOP_AT-th training step.
STOPPING = """
import os, signal
from torch import nn

class Smooth(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.steps = 0
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(num_classes))

    def forward(self, images):
        self.steps += self.training
        if self.training and self.steps == int(os.environ.get("STOP_AT", "0")):
            os.kill(os.getpid(), signal.SIGUSR1)
        return self.body(images)

def smooth(num_classes):
    import torch
    model = Smooth(num_classes).eval()
    model(torch.zeros(1, 1, 8, 8))
    return model.train()
"""


def run_in_parts(tiny, name, words, parts):
    """One run, asked to stop at each part's number of steps of its own, on each part's processes."""
    place = tiny.parent
    for devices, steps in parts:
        more = [f"trainer.devices={devices}", "resume=true", f"output={place / name}"]
        if devices > 1:
            process = start("distill", tiny, *words, *more, cwd=place, STOP_AT=str(steps))
            out, err = process.communicate(timeout=120)
            assert process.returncode == (128 + signal.SIGUSR1 if steps else 0), out + err
            continue
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(InterruptedRunError) if steps else nullcontext(),
        ):
            patch.setenv("STOP_AT", str(steps))
            fit(load(str(tiny), [*words, *more]), Reporter(quiet=True))
    return RunFolder(place / name)


def test_resumed_on_other_numbers_of_processes_it_is_the_unbroken_run(tiny, tmp_path, monkeypatch):
    """Learning rates equal, weights equal to rounding; stopped within epochs and between evaluations."""
    (tmp_path / "smooth.py").write_text(STOPPING)
    monkeypatch.chdir(tmp_path)
    words = [*PLAIN, "trainer.steps=24", "trainer.eval_every=6", "schedule={name: poly, warmup_steps: 7}"]
    whole = run_in_parts(tiny, "whole", words, [(1, 0)])
    broken = run_in_parts(tiny, "broken", words, [(1, 8), (2, 7), (1, 0)])
    ours, theirs = whole.read_history(), broken.read_history()
    assert [(row["step"], row["lr"]) for row in theirs] == [(row["step"], row["lr"]) for row in ours]
    assert [row["loss"] for row in theirs] == pytest.approx([row["loss"] for row in ours], rel=1e-5)
    # Evaluated by two processes in between: every picture counts once, wherever it was.
    assert [row["top1"] for row in theirs] == pytest.approx([row["top1"] for row in ours], abs=0.003)
    expected, found = load_file(whole.student_file), load_file(broken.student_file)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


def test_stopped_in_an_epochs_last_step_it_keeps_the_epochs_row(tiny, tmp_path, monkeypatch):
    """Five steps an epoch: stopped in the fifth, and once more where save_every falls on it."""
    (tmp_path / "smooth.py").write_text(STOPPING)
    monkeypatch.chdir(tmp_path)
    words = [*PLAIN, "trainer.epochs=2", "trainer.save_every=5"]
    whole = run_in_parts(tiny, "whole", words, [(1, 0)])
    broken = run_in_parts(tiny, "broken", words, [(1, 5), (1, 0)])
    assert [row["loss"] for row in broken.read_history()] == [row["loss"] for row in whole.read_history()]
    a, b = load_file(whole.student_file), load_file(broken.student_file)
    assert all(torch.equal(a[key], b[key]) for key in a)
