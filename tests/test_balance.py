"""How hard methods pull at the student: measured, told, and made equal where the weight is `auto`."""

import csv

import pytest
import torch
from torch import nn

from diffkd import Distiller
from diffkd.errors import UserError
from diffkd.recipe.schema import load
from diffkd.training.balance import Balance, gradient_norms


class Alone:
    """A fabric of one process."""

    def all_reduce(self, value, reduce_op):
        return value


def parts(weight):
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5)) for c in (4, 8))
    distiller = Distiller(student, teacher, {"": ""}, {"kd": {"weight": weight}}, torch.rand(2, 3, 8, 8))
    images = torch.randn(16, 3, 8, 8)

    def losses():
        found = distiller(images)
        labels = torch.arange(16) % 5
        return {"task.cross_entropy": nn.functional.cross_entropy(found.output, labels), **found}

    return distiller, losses


def test_gradient_norms_are_those_of_the_whole_students_gradient():
    distiller, losses = parts(0.7)
    found = losses()
    norms = gradient_norms(found, distiller.student, ("task", "kd", "dist", "kd.output.kd"))
    for name, key in (("task", "task.cross_entropy"), ("kd", "kd.output.kd")):
        grads = torch.autograd.grad(found[key], list(distiller.student.parameters()), retain_graph=True)
        torch.testing.assert_close(norms[name], torch.cat([g.flatten() for g in grads]).norm())
    assert norms["dist"] == 0
    assert norms["kd.output.kd"] == norms["kd"]
    found["kd.output.kd"].backward()  # the graph is still there


@pytest.mark.parametrize("unit", [1e-4, 1.0, 300.0])
def test_auto_makes_the_pulls_equal_whatever_a_losss_unit(unit):
    distiller, losses = parts("auto")
    method = distiller.methods["kd"]
    plain = method.forward
    method.forward = lambda *args: {k: unit * v for k, v in plain(*args).items()}
    recipe = load("digits", ["method={kd: auto}"])
    balance = Balance(distiller, recipe, Alone(), 100)
    scaled = balance(losses(), 0)
    norms = gradient_norms(scaled, distiller.student, ("task", "kd"))
    torch.testing.assert_close(norms["kd"], norms["task"])
    sum(scaled.values()).backward()
    again = gradient_norms(losses(), distiller.student, ("task", "kd"))
    torch.testing.assert_close(again["kd"], again["task"])
    weight = distiller.weight_of("kd")
    assert distiller.figures["kd.weight"] == weight
    balance(losses(), 100)  # beyond the first epoch it stays
    assert distiller.weight_of("kd") == weight
    twin, _ = parts("auto")
    twin.load_state_dict(distiller.state_dict())
    assert twin.weight_of("kd") == weight


def test_a_method_that_does_not_pull_keeps_its_weight():
    distiller, losses = parts("auto")
    distiller.methods["kd"].forward = lambda *args: {"output.kd": torch.zeros((), requires_grad=True) * 1}
    Balance(distiller, load("digits", ["method={kd: auto}"]), Alone(), 100)(losses(), 0)
    torch.testing.assert_close(distiller.weight_of("kd"), torch.tensor(0.9))  # its paper's


@pytest.mark.parametrize("words", [["trainer.compile=true"], ["task.weight=0"]], ids=str)
def test_what_cannot_be_measured_is_one_line(words):
    distiller, _ = parts("auto")
    with pytest.raises(UserError, match=r"method\.kd\.weight=auto.*give a number"):
        Balance(distiller, load("digits", ["method={kd: auto}", *words]), Alone(), 100)
    with pytest.raises(UserError, match="weight 'much'; give a number, or auto"):
        parts("much")


def last_weight(folder):
    with (folder / "metrics.csv").open() as file:
        return [row["dist.weight"] for row in csv.DictReader(file)]


def test_a_run_measures_keeps_and_tells_the_weight_the_same_each_time(diffkd, tiny, tmp_path):
    words = ["distill", tiny, "method={dist: auto, kd: 0.5}"]
    assert diffkd(*words, "output=a")[0] == 0
    assert diffkd(*words, "output=b")[0] == 0
    weights = last_weight(tmp_path / "a")
    assert len(set(weights)) == 2  # measured in the first epoch, then kept
    assert 0 < float(weights[-1]) != 1
    states = [tmp_path / name / "student/model.safetensors" for name in "ab"]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_check_tells_the_pulls_and_warns(diffkd, tiny):
    status, out, err = diffkd("check", tiny, "method={kd: 1.0, pkt: 0.001}")
    assert status == 0, err
    assert "pull at the student beside the supervised loss: kd " in out
    assert "warning: method pkt pulls at the student with" in out
    assert "method.pkt.weight=auto" in out
    assert "warning: method kd" not in out
