"""DiffKD's presets: the robust one is the default; each of its departures does what it says."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffkd import Batch, DiffKD, Distiller
from diffkd.errors import UserError
from diffkd.maths.denoiser import Standardizer
from diffkd.methods.base import Feature, Pair, Setup, method_class
from diffkd.recipe.schema import load


@pytest.fixture(autouse=True)
def _one_thread(_quiet_machine):
    torch.set_num_threads(1)


def inputs(scale=1.0, batch=16, teacher=48):
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(batch, c, 3, 3, generator=generator) for c in (5, teacher)]


def student_gradient(module, *features):
    student = features[0].clone().requires_grad_()
    out = module(student, features[1])
    out.loss.backward()
    return student.grad, out


def test_the_robust_preset_is_the_default_and_each_option_overrides_it():
    assert DiffKD(5, 48).settings == DiffKD(5, 48, preset="robust").settings
    assert DiffKD(5, 48).settings.num_steps == 2
    assert DiffKD(5, 48, num_steps=4).settings.num_steps == 4
    assert DiffKD(5, 48).channels == 32
    assert DiffKD(5, 48, latent_channels=16).channels == 16
    assert DiffKD(5, 20).autoencoder is None
    assert DiffKD(5, 48, preset="paper").autoencoder is None
    with pytest.raises(UserError, match="preset 'rubust'; did you mean 'robust'"):
        DiffKD(5, 48, preset="rubust")
    with pytest.raises(UserError, match="warmup=1"):
        DiffKD(5, 48, warmup=1.0)


@pytest.mark.parametrize("recipe", ["cifar100/resnet56-resnet20", "imagenet/resnet34-resnet18"])
def test_recipes_of_published_figures_take_the_papers(recipe):
    assert load(recipe).method["diffkd"].options["preset"] == "paper"


def test_no_gradient_reaches_the_student_while_all_on_its_way_warms_up():
    module = DiffKD(5, 48, warmup=0.25)
    module.expect(8)
    for step in range(8):
        module.zero_grad()
        gradient, out = student_gradient(module, *inputs())
        assert gradient.any() == (step >= 2)
        assert out.kd_loss > 0
        for part in (module.align, module.denoiser.body, module.projection, module.autoencoder):
            assert all(p.grad is not None for p in part.parameters())
        assert module.align.weight.grad.any()
    module.eval()
    assert student_gradient(module, *inputs())[0].any()
    assert module.gate.seen == 8


def test_the_warm_up_goes_on_where_a_checkpoint_left_it():
    module, other = DiffKD(5, 48, warmup=0.2), DiffKD(5, 48, warmup=0.2)
    for m in (module, other):
        m.expect(10)
    module(*inputs())
    other.load_state_dict(module.state_dict())
    assert [student_gradient(other, *inputs())[0].any().item() for _ in range(3)] == [False, True, True]


def test_a_distiller_tells_its_methods_how_long_the_run_is():
    models = [nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5)) for c in (4, 8)]
    distiller = Distiller(*models, {"0": "0", "": ""}, {"diffkd": 1.0, "kd": 1.0}, torch.rand(2, 3, 8, 8))
    distiller.expect(50)
    (fades,) = [m.fades for m in distiller.modules() if hasattr(m, "fades")]
    assert fades == 50


def test_features_of_any_scale_and_offset_give_the_same_losses():
    losses = []
    for scale, offset in ((1, 0), (1e-3, 5e-3), (300, -900)):
        torch.manual_seed(0)
        module, (student, teacher) = DiffKD(5, 48), inputs()
        losses.append(module(student, scale * teacher + offset)[2:6])
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-3, atol=1e-4)


def test_the_standardizers_moments_are_those_of_all_that_it_saw():
    standardizer = Standardizer(4)
    seen = [i + (1 + i) * torch.randn(8, 4, 5) for i in range(6)]
    for feature in seen:
        found = standardizer(feature)
    whole = torch.cat(seen)
    torch.testing.assert_close(standardizer.mean, whole.mean((0, 2)))
    torch.testing.assert_close(standardizer.variance, whole.var((0, 2), unbiased=False))
    at_most = (seen[-1] - standardizer.mean[:, None]) / standardizer.variance[:, None].sqrt()
    torch.testing.assert_close(found, at_most, rtol=2e-2, atol=1e-3)


def test_the_standardizer_leaves_void_out():
    feature, valid = torch.randn(2, 3, 4), torch.tensor([[True, True, False, False]] * 2)
    spoiled = torch.where(valid[:, None], feature, 1e6)
    a, b = Standardizer(3), Standardizer(3)
    found, wanted = a(spoiled, valid), b(feature[..., :2])
    torch.testing.assert_close(found[..., :2], wanted)
    assert not found[..., 2:].any()
    a.eval()(1e6 * spoiled, valid)
    assert torch.equal(a.mean, b.mean)


def test_most_of_the_students_feature_is_kept_at_the_start():
    for dims, shape in ((0, ()), (2, (3, 3))):
        gamma = DiffKD(5, 7, spatial_dims=dims)(torch.randn(4, 5, *shape), torch.randn(4, 7, *shape)).gamma
        torch.testing.assert_close(gamma, torch.full((4,), 0.98))


@pytest.mark.parametrize("shape", [(10,), (10, 4, 4)], ids=str)
def test_class_scores_are_compared_as_they_are(shape):
    """At temperature 4, or 1 where every position has its own."""
    module = DiffKD(10, 10, spatial_dims=len(shape) - 1, distance="kl")
    student, teacher = torch.randn(6, *shape), torch.randn(6, *shape)
    gradient, out = student_gradient(module, student, teacher)
    temperature = 4 if len(shape) == 1 else 1
    ours, theirs = ((x.movedim(1, -1).reshape(-1, 10) / temperature) for x in (student, teacher))
    wanted = temperature**2 * F.kl_div(ours.log_softmax(1), theirs.softmax(1), reduction="batchmean")
    torch.testing.assert_close(out.loss, wanted)
    assert gradient.any()
    assert not list(module.parameters())
    assert torch.equal(module.denoise(student), student)
    with pytest.raises(UserError, match="nothing is denoised"):
        DiffKD(10, 10, distance="kl", latent_channels=4)


def test_the_method_denoises_features_and_compares_scores():
    pairs = (
        Pair("map", Feature("map", (5, 3, 3)), Feature("map", (48, 3, 3))),
        Pair("output", Feature("", (10,)), Feature("", (10,)), is_logits=True),
    )
    method = method_class("diffkd")(Setup(pairs, nn.Identity(), nn.Identity()))
    sides = [{"map": x, "output": torch.randn(16, 10)} for x in inputs()]
    losses = method(*sides, Batch(torch.zeros(16, 3, 8, 8)))
    assert sorted(losses) == ["map.diffusion", "map.kd", "map.reconstruction", "output.kd"]
    assert list(method.figures) == ["map.gamma"]


def test_the_robust_preset_compiles_without_a_graph_break():
    torch.compiler.reset()
    module = DiffKD(5, 48, warmup=0.5)
    module.expect(4)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(4):
            found = []
            for m in (module, compiled):
                torch.manual_seed(seed)
                found.append(student_gradient(m, *inputs()))
            torch.testing.assert_close(found[0][0], found[1][0])
            torch.testing.assert_close(found[0][1].loss, found[1][1].loss)
    assert twin.gate.seen == 4


def test_noise_is_drawn_contiguous_whatever_the_features_layout():
    module = DiffKD(5, 20).eval()
    student, teacher = inputs(teacher=20)
    losses = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        losses.append(module(*(x.to(memory_format=layout) for x in (student, teacher))).loss)
    torch.testing.assert_close(*losses)
    assert losses[0].isfinite()


def test_the_distance_fades_to_nothing_at_the_end():
    module = DiffKD(4, 6, warmup=0.5, fade=True).train()
    module.expect(8)
    student, teacher = torch.randn(4, 4, 3, 3), torch.randn(4, 6, 3, 3)
    pulls = []
    for _ in range(9):
        torch.manual_seed(0)
        state = {name: value.clone() for name, value in module.state_dict().items() if "gate" not in name}
        pulls.append(student_gradient(module, student, teacher)[0].norm().item())
        module.load_state_dict(state, strict=False)  # moving statistics are not what is looked at
    full = pulls[4]
    assert full > 0
    assert [pull / full for pull in pulls] == pytest.approx([0] * 4 + [1, 0.75, 0.5, 0.25, 0], abs=1e-5)


def test_a_compiled_method_is_compiled_once():
    torch.compiler.reset()
    pairs = (Pair("map", Feature("map", (5, 3, 3)), Feature("map", (48, 3, 3))),)
    method, counted = method_class("diffkd")(Setup(pairs, nn.Identity(), nn.Identity())), CompileCounter()
    compiled = torch.compile(method, backend=counted, fullgraph=True)
    for _ in range(2):
        compiled(*({"map": x} for x in inputs()), Batch(torch.zeros(16, 3, 8, 8)))
    assert counted.frame_count == 1
    assert method.figures["map.gamma"] > 0
