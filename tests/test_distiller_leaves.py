"""What stands beside a Distiller: a student without hooks, teachers and outputs of other kinds."""

import copy
import io
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffkd import Distiller, UserError


def net(width):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
    )


IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TAPS = {"1": "1", "": ""}


@pytest.fixture
def distiller():
    torch.manual_seed(0)
    made = Distiller(net(4), net(8), TAPS, "fitnet", IMAGES)
    made(IMAGES).total.backward()
    return made


def test_the_student_pickles_without_diffkd(distiller, tmp_path):
    (tmp_path / "student.pkl").write_bytes(pickle.dumps(distiller.student))
    code = (
        "import pickle, sys; model = pickle.load(open('student.pkl', 'rb')); "
        "assert not [m for m in sys.modules if m.startswith('diffkd')]; assert len(model) == 5"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PATH": ""})


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_student_copies_scripts_traces_and_exports(distiller):
    student = distiller.student.eval()
    expected = student(IMAGES)
    exported = torch.export.export(student, (IMAGES,)).module()
    for other in (
        copy.deepcopy(student),
        torch.jit.script(student),
        torch.jit.trace(student, IMAGES),
        exported,
    ):
        torch.testing.assert_close(other(IMAGES), expected)
    assert not any(module._forward_hooks for module in distiller.modules())
    torch.save(student, io.BytesIO())
    assert bool(distiller(IMAGES).total.isfinite())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("how", [torch.jit.script, lambda model: torch.jit.trace(model, IMAGES)])
def test_torchscript_teaches_by_its_class_scores(how):
    torch.manual_seed(0)
    student, teacher = net(4), net(8).eval()
    expected = Distiller(student, teacher, {"": ""}, "kd", IMAGES)(IMAGES)
    buffer = io.BytesIO()
    torch.jit.save(how(teacher), buffer)
    buffer.seek(0)
    distiller = Distiller(student, torch.jit.load(buffer), {"": ""}, "kd", IMAGES)
    assert not any(p.requires_grad for p in distiller.teacher.parameters())
    torch.testing.assert_close(distiller(IMAGES).total, expected.total)


class Scores(nn.Module):
    """A model as transformers makes them: keyword inputs, an object with `logits`."""

    def __init__(self, width):
        super().__init__()
        self.net = net(width)

    def forward(self, pixel_values, labels=None):
        return SimpleNamespace(logits=self.net(pixel_values), loss=labels)


def test_outputs_with_logits_and_keyword_inputs():
    torch.manual_seed(0)
    student, teacher = Scores(4), Scores(8)
    expected = Distiller(student.net, teacher.net, TAPS, "dist", IMAGES)(IMAGES)
    for sample, options in (
        (IMAGES, {}),
        ({"pixel_values": IMAGES}, {}),
        ({"pixel_values": IMAGES}, {"run": lambda model, batch: model(**batch.images)}),
        ({"x": IMAGES}, {"run": lambda model, batch: model(pixel_values=batch.images["x"])}),
    ):
        taps = {f"net.{k}" if k else k: f"net.{v}" if v else v for k, v in TAPS.items()}
        losses = Distiller(student, teacher, taps, "dist", sample, **options)(sample)
        torch.testing.assert_close(losses.output.logits, expected.output)
        torch.testing.assert_close(losses.total, expected.total)


@pytest.mark.parametrize("taps", [{"": "[logits]"}, {"[logits]": "[logits]"}, {"": ""}])
def test_entries_of_an_output_can_be_named(taps):
    distiller = Distiller(Scores(4), Scores(8), taps, "kd", IMAGES)
    assert distiller.pairs[0].is_logits
    assert bool(distiller(IMAGES).total.isfinite())


def test_a_closed_distiller_lets_the_teacher_go():
    student = net(4)
    with Distiller(student, net(8), TAPS, "fitnet", IMAGES) as distiller:
        assert bool(distiller(IMAGES).total.isfinite())
    assert distiller.teacher is None
    assert distiller.student is student
    with pytest.raises(UserError, match="this Distiller is closed"):
        distiller(IMAGES)


def test_methods_by_word_add_up():
    student, teacher = net(4), net(8)
    both = Distiller(student, teacher, TAPS, "dist+kd", IMAGES)
    assert list(both.methods) == ["dist", "kd"]
    dist, kd = (Distiller(student, teacher, TAPS, name, IMAGES)(IMAGES).total for name in ("dist", "kd"))
    torch.testing.assert_close(both(IMAGES).total, dist + kd)
    both.weights["kd"] = 0.0
    torch.testing.assert_close(both(IMAGES).total, dist)


def test_own_methods_of_one_class_name_both_count(tmp_path):
    code = """
import torch
from diffkd import Method
class My(Method):
    def __init__(self, setup):
        super().__init__()
    def forward(self, student, teacher, batch):
        return {"kd": torch.tensor(%s)}
class task(My): pass
"""
    names = []
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 4.0)):
        (tmp_path / f"{name}.py").write_text(code % value)
        names.append(f"{tmp_path}/{name}.py:My")
    losses = Distiller(net(4), net(8), TAPS, dict.fromkeys(names, 1.0), IMAGES)(IMAGES)
    assert {k: float(v) for k, v in losses.items()} == {"My.kd": 1.0, "My_2.kd": 2.0, "My_3.kd": 4.0}
    # `task` is what supervised losses are called
    losses = Distiller(net(4), net(8), TAPS, {names[0].replace(":My", ":task"): 1.0}, IMAGES)(IMAGES)
    assert list(losses) == ["task_2.kd"]
