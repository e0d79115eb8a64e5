import copy

import pytest
import torch
from torch import nn

from diffkd import Distiller, UserError


class Net(nn.Module):
    def __init__(self, width, classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


@pytest.fixture
def models():
    torch.manual_seed(0)
    return Net(4), Net(8)


IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_default_taps_are_the_last_map_and_the_output(models):
    distiller = Distiller(*models, sample=IMAGES)
    assert [(p.student.shape, p.teacher.shape) for p in distiller.pairs] == [
        ((8, 4, 4), (16, 4, 4)),
        ((5,), (5,)),
    ]
    assert [p.is_logits for p in distiller.pairs] == [False, True]


def test_losses_are_named_weighted_and_carry_the_output(models):
    torch.manual_seed(0)
    whole = Distiller(*models, {"body": "body", "": ""}, {"diffkd": 1.0}, IMAGES)
    half = copy.deepcopy(whole)
    half.weights["diffkd"] = 0.5
    torch.manual_seed(1)
    a = whole(IMAGES)
    torch.manual_seed(1)
    b = half((IMAGES, torch.zeros(4)))
    assert set(a) == {"diffkd.body.kd", "diffkd.body.diffusion", "diffkd.output.kd"}
    assert a.output.shape == (4, 5)
    torch.testing.assert_close(a.total, 2 * b.total)


def test_student_and_method_learn_teacher_does_not(models):
    distiller = Distiller(*models, sample=IMAGES)
    before = copy.deepcopy(distiller.teacher.state_dict())
    distiller.train()
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
    for _ in range(2):
        losses = distiller(IMAGES)
        (losses.total + losses.output.square().mean()).backward()
        optimizer.step()
    assert not distiller.teacher.training
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in distiller.teacher.state_dict().items())
    assert all(p.grad is not None for p in distiller.parameters())


def test_state_dict_holds_the_plain_student_and_no_teacher(models):
    plain = set(models[0].state_dict())
    distiller = Distiller(*models, sample=IMAGES)
    keys = set(distiller.state_dict())
    assert {k.removeprefix("student.") for k in keys if k.startswith("student.")} == plain
    assert not any("teacher" in k for k in keys)
    assert set(models[0].state_dict()) == plain
    other = Distiller(Net(4), Net(8), sample=IMAGES)
    other.load_state_dict(distiller.state_dict())


def test_teacher_follows_to_another_dtype_and_device(models):
    distiller = Distiller(*models, sample=IMAGES).double()
    assert next(distiller.teacher.parameters()).dtype == torch.float64
    assert distiller(IMAGES.double()).total.dtype in (torch.float32, torch.float64)
    assert next(distiller.to("meta").teacher.parameters()).device.type == "meta"


def test_dry_run_leaves_the_models_as_they_were(models):
    before = [copy.deepcopy(m.state_dict()) for m in models]
    models[0].train()
    state = torch.get_rng_state()
    Distiller(*models, methods="none", sample=IMAGES)
    assert models[0].training
    assert torch.equal(torch.get_rng_state(), state)
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())


def test_unknown_layer_names_the_nearest(models):
    with pytest.raises(UserError, match=r"'boddy'.*'body'"):
        Distiller(*models, {"boddy": "body"}, sample=IMAGES)


def test_different_class_counts_are_refused():
    with pytest.raises(UserError, match="student has 5 classes, the teacher 7"):
        Distiller(Net(4), Net(8, 7), sample=IMAGES)


def test_method_without_teacher_is_refused(models):
    with pytest.raises(UserError, match="'diffkd' needs a teacher"):
        Distiller(models[0], None, sample=IMAGES)


def test_a_frozen_student_is_told_of(models):
    models[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="'body' of the student gets no gradient"):
        Distiller(*models, {"body": "body"}, sample=IMAGES)


def test_deep_copy_reads_its_own_models(models):
    distiller = Distiller(*models, sample=IMAGES).eval()
    other = copy.deepcopy(distiller)
    with torch.no_grad():
        for p in other.student.parameters():
            p.zero_()
    assert distiller(IMAGES).output.abs().sum() > 0
    assert other(IMAGES).output.abs().sum() == 0
    assert next(iter(other(IMAGES).values())).isfinite()


class Counted(nn.Module):
    """A preparation that counts its calls."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        return images * 2


class Careless(Net):
    """Changes the pictures that it is given."""

    def forward(self, x):
        return super().forward(x.mul_(3))


@pytest.mark.parametrize(("kind", "calls"), [(Net, 1), (Careless, 2)])
def test_pictures_are_prepared_once_for_models_that_leave_them_as_they_are(models, kind, calls):
    student, teacher = models[0], kind(8)
    seen, found = [Counted(), Counted()], []
    for inputs in ((seen[0], seen[0]), (seen[0], seen[1])):
        torch.manual_seed(0)
        roles = {"student_input": inputs[0], "teacher_input": inputs[1]}
        distiller = Distiller(student, teacher, {"body": "body"}, "fitnet", IMAGES, **roles)
        before = seen[0].calls
        found.append(distiller(IMAGES))
        found[-1]["calls"] = seen[0].calls - before
    assert [losses.pop("calls") for losses in found] == [calls, 1]
    assert dict(found[0]) == dict(found[1])


def test_whole_step_compiles_without_a_graph_break(models):
    distiller = Distiller(*models, sample=IMAGES)

    def step(images):
        losses = distiller(images)
        return losses.total + losses.output.square().mean()

    torch.manual_seed(0)
    expected = step(IMAGES)
    torch.manual_seed(0)
    compiled = torch.compile(step, fullgraph=True, backend="eager")(IMAGES)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


def test_inner_modules_compile_and_their_taps_still_fire(models):
    distiller = Distiller(*models, sample=IMAGES)
    torch.manual_seed(0)
    expected = distiller(IMAGES)
    for module in (distiller.student, distiller.teacher, *distiller.methods.values()):
        module.compile(fullgraph=True, backend="eager")
    torch.manual_seed(0)
    found = distiller(IMAGES)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3)


def test_autocast_gives_finite_losses(models):
    distiller = Distiller(*models, sample=IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        losses = distiller(IMAGES)
    assert all(v.isfinite() for v in losses.values())


def test_a_tap_with_its_layout_said_is_distilled(models):
    distiller = Distiller(*models, taps={"body@BCHW": "body@BCHW", "": ""}, sample=IMAGES)
    assert [pair.name for pair in distiller.pairs] == ["body", "output"]
