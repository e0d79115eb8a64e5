"""Several teachers, and what each method learns from, how much and when."""

import copy
import warnings
from typing import get_type_hints

import pytest
import torch
from torch import nn

from diffkd import DiffKD, Distiller, UserError
from diffkd.distiller import Losses
from diffkd.methods.choice import share_of


def net(width):
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5)),
    )


IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TAPS = {"1": "1", "2": "2", "": ""}


@pytest.fixture
def models():
    torch.manual_seed(0)
    return net(4), net(8), net(6)


def test_a_method_learns_from_its_own_taps_with_a_weight_for_each(models):
    student, teacher, _ = models
    torch.manual_seed(1)
    plain = Distiller(student, teacher, TAPS, {"fitnet": 2.0}, IMAGES)
    torch.manual_seed(1)
    weighed = Distiller(
        *(student, teacher, TAPS, {"fitnet": {"weight": 2.0, "taps": {"1": 0.5, "2": 3.0}}}, IMAGES)
    )
    expected, found = plain(IMAGES), weighed(IMAGES)
    assert list(found) == ["fitnet.1.kd", "fitnet.2.kd"]
    torch.testing.assert_close(found["fitnet.1.kd"], 0.5 * expected["fitnet.1.kd"])
    torch.testing.assert_close(found["fitnet.2.kd"], 3.0 * expected["fitnet.2.kd"])
    shared = {"fitnet": {"taps": ["2"]}, "at": {"taps": ["1"]}, "kd": None}
    assert list(Distiller(student, teacher, TAPS, shared, IMAGES)(IMAGES)) == [
        *("fitnet.2.kd", "at.1.kd", "kd.output.kd")
    ]


@pytest.mark.parametrize(
    ("taps", "methods", "left"),
    [
        (TAPS, {"diffkd": None, "kd": None}, True),
        (TAPS, {"diffkd": {"taps": ["1", ""]}, "kd": None}, False),
        (TAPS, {"diffkd": {"preset": "paper"}, "kd": None}, False),
        (TAPS, {"diffkd": None, "fitnet": None}, False),
        ({"": ""}, {"diffkd": None, "kd": None}, False),
    ],
)
def test_diffkd_leaves_class_scores_to_a_method_of_scores(models, taps, methods, left):
    student, teacher, _ = models
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        losses = Distiller(student, teacher, taps, methods, IMAGES)(IMAGES)
    assert ("diffkd.output.kd" in losses) is not left
    assert [str(w.message) for w in said] == left * [
        "method 'diffkd' leaves the class scores to the other method"
    ]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"fitnet": {"taps": ["3"]}}, "method 'fitnet': tap '3' is not among its taps"),
        ({"kd": {"weight": "auto", "schedule": [[0, 1]]}}, "the weight auto is measured"),
        ({"kd": {"schedule": [[0, 1], [2, 0]]}}, "from 0 to 1|share of the run"),
        ({"kd": {"schedule": [[0, 1], [1, -1]]}}, "is negative"),
        ({"kd": {"schedule": [[0, 1], [1, 0]]}}, r"call distiller.at\(progress\)"),
    ],
)
def test_choices_that_cannot_be(models, choice, said):
    with pytest.raises(UserError, match=said):
        Distiller(models[0], models[1], TAPS, choice, IMAGES)(IMAGES)


def test_one_loss_of_all_taps_cannot_be_weighed_by_tap():
    assert share_of("layer1.0.kd", {"layer1": 1.0, "layer1.0": 2.0}, "mine") == 2.0
    with pytest.raises(UserError, match="a weight per tap says nothing to it"):
        share_of("all", {"1": 1.0, "2": 0.5}, "mine")


def test_a_weight_on_a_schedule(models):
    student, teacher, _ = models
    constant = Distiller(student, teacher, TAPS, {"kd": 4.0}, IMAGES)(IMAGES).total
    distiller = Distiller(
        student, teacher, TAPS, {"kd": {"weight": 4.0, "schedule": [[0, 0], [0.5, 1], [1, 0.5]]}}, IMAGES
    )
    for progress, factor in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 0.75), (1.0, 0.5)):
        distiller.at(progress)
        torch.testing.assert_close(distiller(IMAGES).total, factor * constant)


def test_a_recipe_says_taps_and_schedule():
    from diffkd.assembly import assemble
    from diffkd.recipe.schema import _validate, dump, load, yaml

    chosen = "method={kd: {weight: 2.0, schedule: [[0, 1], [1, 0]], taps: ['']}}"
    recipe = load("digits-8x8", [chosen, "student=simple/cnn4", "teacher=simple/cnn8", "teacher.train=null"])
    assert _validate(yaml.safe_load(dump(recipe)), "again").method == recipe.method
    parts = assemble(recipe)
    distiller, _ = parts.distiller(parts.sample(4))
    totals = []
    for progress in (0.0, 0.5, 1.0):
        distiller.at(progress)
        totals.append(distiller(parts.sample(4)).total)
    torch.testing.assert_close(torch.stack(totals), totals[0] * torch.tensor([1.0, 0.5, 0.0]))
    with pytest.raises(UserError, match=r"method\.kd.*needs pairs"):
        load("digits-8x8", ["method={kd: {schedule: [[0, 1, 2]]}}"])


def test_several_teachers_count_alike_or_by_weight(models):
    student, big, wide = models
    alone = [Distiller(student, t, {"": ""}, {"kd": 2.0}, IMAGES)(IMAGES).total for t in (big, wide)]
    teachers = {"big": big, "wide": wide}
    both = Distiller(student, teachers, {"": ""}, {"kd": 2.0}, IMAGES)
    losses = both(IMAGES)
    assert list(losses) == ["kd_big.output.kd", "kd_wide.output.kd"]
    torch.testing.assert_close(losses.total, (alone[0] + alone[1]) / 2)
    weighed = Distiller(
        student, teachers, {"": ""}, {"kd": 2.0}, IMAGES, teacher_weights={"big": 3, "wide": 1}
    )
    torch.testing.assert_close(weighed(IMAGES).total, 0.75 * alone[0] + 0.25 * alone[1])
    weighed.weights["kd_big"] = 0.0
    torch.testing.assert_close(weighed(IMAGES).total, 0.25 * alone[1])


def test_each_teacher_has_taps_and_pictures_of_its_own(models):
    class Double(nn.Module):
        def forward(self, images):
            return images * 2

    student, big, wide = models
    torch.manual_seed(1)
    taps = {"big": {"1": "1"}, "wide": {"2": "2"}}
    inputs = {"big": nn.Identity(), "wide": Double()}
    distiller = Distiller(student, {"big": big, "wide": wide}, taps, "fitnet", IMAGES, teacher_input=inputs)
    losses = copy.deepcopy(distiller)(IMAGES)
    assert list(losses) == ["fitnet_big.1.kd", "fitnet_wide.2.kd"]
    ours, theirs = student[:3](IMAGES), wide[:3](IMAGES * 2)
    fitted = distiller.methods["fitnet_wide"].regressors["2"](ours)
    torch.testing.assert_close(losses["fitnet_wide.2.kd"], 50 * (fitted - theirs).square().mean())
    assert not any("teacher" in key for key in distiller.state_dict())
    assert all(not p.requires_grad for p in (*big.parameters(), *wide.parameters()))
    found = Distiller(student, {"big": big, "wide": wide}, sample=IMAGES)  # taps are found for each
    assert [pair.name for pair in found.pairs] == ["2", "output"] * 2
    found.at(0)
    found(IMAGES).total.backward()
    assert found.double()(IMAGES.double()).total.isfinite()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher_weights": {"big": 1.0}}, "teacher_weights names"),
        ({"teacher_weights": {"big": 0.0, "wide": 0.0}}, "one must be positive"),
        ({"taps": {"big": {"": ""}}}, "taps by teacher: 'wide' has none"),
    ],
)
def test_teachers_that_do_not_fit(models, options, said):
    with pytest.raises(UserError, match=said):
        Distiller(models[0], {"big": models[1], "wide": models[2]}, methods="kd", sample=IMAGES, **options)


def test_losses_are_typed_for_editors():
    assert get_type_hints(Distiller.forward)["return"] is Losses
    assert get_type_hints(Losses.total.fget)["return"] is torch.Tensor
    hints = get_type_hints(get_type_hints(DiffKD.forward)["return"])
    assert {hints[key] for key in ("loss", "kd_loss", "diffusion_loss")} >= {torch.Tensor}


KINDS = {
    "vectors": (nn.Linear, (7,)),
    "sequences": (nn.Conv1d, (3, 12)),
    "maps": (nn.Conv2d, (3, 8, 8)),
    "volumes": (nn.Conv3d, (3, 6, 6, 6)),
}


@pytest.mark.parametrize("kind", [*KINDS, "tokens"])
def test_features_of_every_kind(kind):
    torch.manual_seed(0)
    if kind == "tokens":
        made = [nn.TransformerEncoderLayer(width, 2, 16, batch_first=True) for width in (8, 8)]
        sample, taps = torch.rand(4, 9, 8), {"@BLC": "@BLC"}
    else:
        layer, shape = KINDS[kind]
        rest = {} if kind == "vectors" else {"kernel_size": 3, "padding": 1}
        made = [nn.Sequential(layer(shape[0], width, **rest), nn.ReLU()) for width in (4, 8)]
        sample, taps = torch.rand(4, *shape), {"1": "1"}
    distiller = Distiller(*made, taps, "fitnet+diffkd", sample, logits=())
    losses = distiller(sample)
    losses.total.backward()
    assert {"diffkd"} < {name.partition(".")[0] for name in losses}
    assert all(p.grad is not None for p in made[0].parameters())
