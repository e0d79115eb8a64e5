"""What fails in training alone shows before any work; checkpoints hold nothing that is not finite."""

import threading

import pytest
import torch
from safetensors.torch import load_file

from diffkd.assembly import assemble
from diffkd.errors import UserError
from diffkd.recipe.schema import load
from diffkd.runs.console import Reporter
from diffkd.runs.folder import RunFolder, load_checkpoint
from diffkd.training.fit import fit

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, kind):
        super().__init__()
        self.body, self.kind = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes)), kind
        self.unused = nn.Linear(3, 3)
        self.steps = 0

    def forward(self, images):
        out = self.body(images)
        self.steps += self.training
        if self.training and self.kind == "poison" and self.steps == 6:  # the dry run is the first
            out.register_hook(lambda grad: grad * float("nan"))
        return out

def unused(num_classes): return Net(num_classes, "unused")
def poison(num_classes): return Net(num_classes, "poison")

def teacher(num_classes):
    class Runtime(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :num_classes]
    return Runtime()

def second(num_classes):
    class Second(Net):
        def forward(self, images, masks):
            return self.body(images)
    return Second(num_classes, "second")

def later(num_classes):
    class Later(Net):
        def forward(self, images):
            found = super().forward(images)
            if self.steps == 4:
                raise KeyError("scale")
            return found
    return Later(num_classes, "later")

def stops(num_classes):
    class Stops(Net):
        def forward(self, images):
            return next(iter([]))
    return Stops(num_classes, "stops")

def norm(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, num_classes))
"""


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        reporter, said = Reporter(quiet=True), []
        reporter.warn = said.append
        student = [f"student=nets.py:{name}"] if name else []
        words = [*student, f"output={tmp_path / 'a'}", *words]
        return fit(load(str(tiny), words), reporter), said

    return run


def test_what_fails_in_training_mode_alone_is_refused_before_any_work(run, tmp_path):
    with pytest.raises(UserError, match=r"1 picture fails: .*give every device 2 pictures or more"):
        run("norm", "method=none", "data.batch_size=1")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("second", r"cannot take pictures of \(1, 8, 8\): TypeError: .*missing 1 required .*'masks'"),
        ("stops", r"cannot take pictures of \(1, 8, 8\): StopIteration \(nets.py, line \d+\)"),
        ("later", r"^training step 3 fails: KeyError: 'scale' \(nets.py, line \d+\)"),
    ],
)
def test_errors_of_models_of_ones_own_are_one_line(run, name, said):
    with pytest.raises(UserError, match=said):
        run(name, "method=none", "trainer.epochs=1")


def test_weights_without_gradient_are_said_and_do_not_stand_in_the_way_of_resume(run, tmp_path):
    words = ["method=none", "optimizer=adamw", "trainer.epochs=3", "trainer.keep=all"]
    whole, said = run("unused", *words)
    assert any("no gradient reaches 2 weights" in line and "unused.weight" in line for line in said)
    weights = load_file(whole.student_file)
    (whole.path / "summary.json").unlink()
    whole.list_checkpoints()[-1].unlink()
    again, _ = run("unused", "resume=true", *words)
    assert all(torch.equal(value, weights[name]) for name, value in load_file(again.student_file).items())


def test_a_nan_gradient_in_the_last_step_of_an_epoch_poisons_no_checkpoint(run, tmp_path):
    with pytest.raises(UserError, match=r"not finite after step 5, though .*no checkpoint was saved"):
        run("poison", "method=none")
    with pytest.raises(UserError, match=r"not finite after step 5, though .*last good .* is step-000000004"):
        run("poison", "method=none", "resume=true", "trainer.save_every=4")
    for path in RunFolder(tmp_path / "a").list_checkpoints():
        assert all(v.isfinite().all() for v in load_checkpoint(path)["model"].values())


def test_a_teacher_without_weights_teaches_to_the_end(run):
    folder, _ = run("", "teacher=nets.py:teacher", "method=kd", "taps={'': ''}", "trainer.epochs=1")
    assert folder.read_summary()["teacher"]["parameters"] == 0


def test_runs_in_two_threads_end_with_the_same_bits(run, tmp_path):
    found = []

    def work(name):
        words = ("method=none", "trainer.epochs=1", f"output={tmp_path / name}")
        found.append(run("unused", *words)[0])

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(folder.finished for folder in found)
    assert len({folder.student_file.read_bytes() for folder in found}) == 1


@pytest.mark.parametrize(
    "words",
    ["trainer.devices=1000", "trainer.threads=1000000000", "data.workers=100000", "trainer.strategy=fsdp"],
)
def test_numbers_beyond_all_machines_and_what_cannot_work_are_refused(run, words):
    with pytest.raises(UserError, match=words.partition("=")[0]):
        run("unused", "method=none", words)


def test_an_option_of_a_method_that_no_machine_can_compute_with_is_one_line():
    words = ["teacher.train=null", "method=diffkd", "method.diffkd.latent_channels=1000000000000"]
    parts = assemble(load("digits-8x8", words))
    with pytest.raises(UserError, match="method diffkd: a number of its options is too large"):
        parts.distiller(parts.sample(2))
