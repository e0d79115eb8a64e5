import copy
import shutil
import warnings

import pytest
import torch
from torch import nn

import oracle_diffkd as oracle
from diffkd import DiffKD
from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.methods.base import Feature, Method, Pair, Setup, method_class
from diffkd_cases import BATCH, CASES, DIMS, LATENT, POSITIONS, STUDENT, TEACHER, build, features, gradient


@pytest.fixture(autouse=True)
def _one_thread(_quiet_machine):
    torch.set_num_threads(1)


# Sizes, batches, number formats


def resized(dims, size):
    return torch.randn(BATCH, TEACHER, *[size] * dims, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("larger", ["student", "teacher"])
@pytest.mark.parametrize("latent", [None, LATENT])
def test_unequal_sizes_are_matched_and_told_once(dims, larger, latent):
    module = build(dims, latent, student=TEACHER)
    student, teacher = (
        resized(dims, 8 if larger == "student" else 4),
        resized(dims, 4 if larger == "student" else 8),
    )
    student.requires_grad_()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out = module(student, teacher)
        again = module(student, teacher)
    assert len(told) == 1
    text = str(told[0].message)
    assert larger in text
    assert "8" in text
    assert "4" in text
    assert out.target.shape == out.denoised.shape == again.denoised.shape
    assert out.target.shape[2:] == (4,) * dims
    out.loss.backward()
    assert student.grad.any()
    if larger == "student":
        assert (student.grad != 0).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("ours", "theirs"), [((7, 7), (3, 3)), ((5, 5), (7, 6)), ((8, 3), (2, 9))], ids=str)
def test_any_two_sizes_are_matched(ours, theirs):
    out = build()(torch.randn(2, STUDENT, *ours), torch.randn(2, TEACHER, *theirs))
    assert out.denoised.shape == out.target.shape
    assert out.loss.isfinite()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3, 10])
def test_few_channels_leave_a_bottleneck_of_at_least_one(dims, channels):
    module = build(dims, student=channels, teacher=channels)
    assert module(*features(dims, student=channels, teacher=channels)).loss.isfinite()


def test_equal_sizes_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build()(*features())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_map_twice_as_large_is_averaged(dims):
    module = build(dims)
    teacher = resized(dims, 8)
    student = torch.randn(BATCH, STUDENT, *[4] * dims)
    with pytest.warns(UserWarning, match="resized"):
        target = module(student, teacher).target
    pool = getattr(torch.nn.functional, f"avg_pool{dims}d")
    torch.testing.assert_close(target, pool(teacher, 2))


@pytest.mark.parametrize("positions", [(), (1,), (4,), (1, 1), (3, 2), (1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("latent", [None, LATENT])
def test_batch_of_one_trains(positions, latent):
    latent = latent if positions else None
    module = build(len(positions), latent).train()
    student = torch.randn(1, STUDENT, *positions, requires_grad=True)
    out = module(student, torch.randn(1, TEACHER, *positions))
    assert out.denoised.shape == (1, latent or TEACHER, *positions)
    assert out.gamma.shape == (1,)
    out.loss.backward()
    assert out.loss.isfinite()
    assert student.grad.isfinite().all()
    assert all(gradient(p).isfinite().all() for p in module.parameters())
    assert all(b.isfinite().all() for b in module.buffers())


def loss_values(out):
    return [out.loss, out.kd_loss, out.diffusion_loss, out.reconstruction_loss]


@pytest.mark.parametrize(("dims", "latent", "kind"), CASES)
def test_autocast_gives_finite_float32_losses(dims, latent, kind):
    module = build(dims, latent, distance=kind)
    student, teacher = features(dims)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(student.requires_grad_(), teacher.bfloat16())
    assert all(value.dtype == torch.float32 and value.isfinite() for value in loss_values(out))
    out.loss.backward()
    assert student.grad.isfinite().all()


def test_autocast_gives_nearly_the_float32_loss():
    module = build().eval()
    target, timesteps = features()[1], torch.tensor([10, 500, 990])
    noise = torch.randn_like(target)
    exact = module.diffusion_loss(target, noise=noise, timesteps=timesteps)
    with torch.autocast("cpu", torch.bfloat16):
        rough = module.diffusion_loss(target, noise=noise, timesteps=timesteps)
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dims", "latent", "kind"), CASES)
def test_half_precision_modules_give_finite_float32_losses(dims, latent, kind, dtype):
    module = build(dims, latent, distance=kind, dtype=dtype)
    student, teacher = features(dims, dtype=dtype)
    out = module(student.requires_grad_(), teacher)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in loss_values(out))
    out.loss.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_schedule_stays_precise_in_half_precision(dtype):
    """At t = 0 alpha_bar is 0.9999: rounded to half precision, no noise would be left."""
    module = build(dtype=dtype).eval()
    seen = []
    module.denoiser.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    noise, clean = features(student=TEACHER, dtype=dtype)[0], torch.zeros(BATCH, TEACHER, *POSITIONS[2])
    timesteps = torch.tensor([0, 1, 2])
    module.diffusion_loss(clean.to(dtype), noise=noise, timesteps=timesteps)
    module.float().diffusion_loss(clean, noise=noise.float(), timesteps=timesteps)
    wanted = oracle.add_noise(clean.double(), noise.double(), timesteps)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(seen[0].double(), wanted, rtol=rounding, atol=1e-6)
    torch.testing.assert_close(seen[1].double(), wanted, rtol=1e-5, atol=1e-5)


# What a training program does with it


@pytest.mark.parametrize(("dims", "latent"), [(0, None), (1, None), (2, LATENT), (3, None)])
def test_compiles_without_a_graph_break(dims, latent):
    torch.compiler.reset()
    module = build(dims, latent)
    inputs = features(dims)
    inputs[0].requires_grad_()
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    outs = []
    for m in (module, compiled):
        torch.manual_seed(5)
        outs.append(m(*inputs))
        outs[-1].loss.backward()
    torch.testing.assert_close(outs[1].loss, outs[0].loss)
    torch.testing.assert_close(outs[1].denoised, outs[0].denoised)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.filterwarnings("ignore")
def test_compiles_with_maps_of_unequal_size():
    torch.compiler.reset()
    assert_compiled_is_eager(build(2).eval(), torch.randn(2, STUDENT, 4, 4), torch.randn(2, TEACHER, 8, 8))


def assert_compiled_is_eager(module, *inputs):
    torch.manual_seed(5)
    compiled = torch.compile(module, fullgraph=True, backend="eager")(*inputs)
    torch.manual_seed(5)
    torch.testing.assert_close(tuple(compiled), tuple(module(*inputs)))


@pytest.mark.parametrize("options", [{"detach_denoiser": True}, {"distance": "kl"}], ids=str)
def test_compiles_with_every_option(options):
    torch.compiler.reset()
    assert_compiled_is_eager(build(2, **options).eval(), *features())


@pytest.mark.parametrize("positions", [(), (1, 1)], ids=str)
def test_compiles_with_one_value_per_channel(positions):
    torch.compiler.reset()
    module = build(len(positions)).train()
    assert_compiled_is_eager(module, torch.randn(1, STUDENT, *positions), torch.randn(1, TEACHER, *positions))
    assert all(m.training for m in module.modules())


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="needs a C++ compiler")
def test_inductor_gives_the_eager_result():
    torch.compiler.reset()
    module = build(0, num_steps=1, start_timestep=100).eval()
    student, noise = features(0)
    with torch.no_grad():
        compiled = torch.compile(module.denoise, fullgraph=True)(student, noise)
        torch.testing.assert_close(compiled, module.denoise(student, noise), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", DIMS)
def test_schedule_follows_the_module_to_another_device(dims):
    """No tensor is left behind on the first device."""
    module = build(dims).to("meta")
    inputs = [x.to("meta") for x in features(dims)]
    assert module(*inputs).loss.device.type == "meta"


def test_default_dtype_and_device_are_obeyed():
    torch.set_default_dtype(torch.float64)
    try:
        module = DiffKD(STUDENT, TEACHER, preset="paper").eval()
    finally:
        torch.set_default_dtype(torch.float32)
    target, noise = torch.zeros(1, TEACHER, 2, 2).double(), torch.randn(1, TEACHER, 2, 2).double()
    seen = []
    module.denoiser.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    module.diffusion_loss(target, noise=noise, timesteps=torch.tensor([0]))
    torch.testing.assert_close(seen[0], 0.01 * noise, rtol=1e-10, atol=0)
    with torch.device("meta"):
        module = DiffKD(STUDENT, TEACHER, preset="paper", latent_channels=LATENT)
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}
    module.to_empty(device="cpu").load_state_dict(build(2, LATENT).state_dict())
    assert module(*features()).loss.isfinite()


def test_deepcopy_is_independent():
    module = build(2, LATENT).eval()
    twin = copy.deepcopy(module)
    student = features()[0]
    noise = torch.randn(BATCH, LATENT, *POSITIONS[2])
    before = module.denoise(student, noise=noise)
    torch.testing.assert_close(twin.denoise(student, noise=noise), before, rtol=0, atol=0)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    torch.testing.assert_close(module.denoise(student, noise=noise), before, rtol=0, atol=0)
    assert not twin.denoise(student, noise=noise).any()


@pytest.mark.parametrize("dims", DIMS)
def test_state_dict_round_trip(dims, tmp_path):
    latent = LATENT if dims else None
    module, other = build(dims, latent), build(dims, latent, seed=9)
    module(*features(dims))
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    for m in (module, other):
        m.eval()
    student, teacher = features(dims, seed=4)
    noise = torch.randn(BATCH, latent or TEACHER, *POSITIONS[dims])
    assert torch.equal(other.denoise(student, noise=noise), module.denoise(student, noise=noise))
    outs = []
    for m in (module, other):
        torch.manual_seed(6)
        outs.append(m(student, teacher).loss)
    assert torch.equal(*outs)


def test_same_seed_same_losses_other_seed_others():
    module = build().eval()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(module(*features()).loss)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "options",
    [
        {"spatial_dims": 4},
        {"spatial_dims": -1},
        {"student_channels": 0},
        {"teacher_channels": -3},
        {"latent_channels": 0},
        {"latent_channels": 8, "spatial_dims": 0},
        {"num_steps": 0},
        {"num_steps": 6, "start_timestep": 5},
        {"train_timesteps": 0},
        {"start_timestep": 0},
        {"start_timestep": 1001},
        {"start_timestep": 500, "train_timesteps": 100},
        {"distance": "l7"},
    ],
    ids=str,
)
def test_bad_arguments_are_one_clear_line(options):
    with pytest.raises(UserError) as error:
        DiffKD(**{"student_channels": 4, "teacher_channels": 8} | options)
    text = str(error.value)
    assert "\n" not in text
    assert any(name in text for name in options)
    if "distance" in options:
        assert "mse" in text
        assert "kl" in text


@pytest.mark.parametrize(
    ("student", "teacher", "side"),
    [
        ((2, STUDENT + 1, 4, 4), (2, TEACHER, 4, 4), "student"),
        ((2, STUDENT, 4, 4), (2, STUDENT, 4, 4), "teacher"),
        ((2, STUDENT, 4), (2, TEACHER, 4, 4), "student"),
        ((2, STUDENT, 4, 4), (2, TEACHER), "teacher"),
    ],
    ids=str,
)
def test_features_of_another_shape_are_one_clear_line(student, teacher, side):
    with pytest.raises(UserError, match=side) as error:
        build()(torch.randn(student), torch.randn(teacher))
    assert "\n" not in str(error.value)


# As a method of a run


MIXED = (
    Pair("layer4.1", Feature("layer4.1", (STUDENT, 5, 4)), Feature("layer4.2", (TEACHER, 5, 4))),
    Pair("keys", Feature("keys", (STUDENT, 6)), Feature("keys", (TEACHER, 6))),
    Pair("pooled", Feature("pooled", (STUDENT,)), Feature("pooled", (TEACHER,))),
    Pair("scores", Feature("scores", (7, 5, 4)), Feature("scores", (7, 5, 4)), is_logits=True),
    Pair("output", Feature("", (10,)), Feature("", (10,)), is_logits=True),
)


def method_run(pairs=MIXED, batch=BATCH, **options):
    torch.manual_seed(0)
    options = {"preset": "paper", **options}
    method = method_class("diffkd")(Setup(pairs, nn.Identity(), nn.Identity()), **options)
    student, teacher = (
        {p.name: torch.randn(batch, *getattr(p, side).shape) for p in pairs}
        for side in ("student", "teacher")
    )
    return method, method(student, teacher, Batch(torch.zeros(batch, 3, 8, 8)))


def test_method_names_its_losses_and_figures():
    method, losses = method_run()
    assert isinstance(method, Method)
    assert list(losses) == [f"{p.name}.{kind}" for p in MIXED for kind in ("kd", "diffusion")]
    assert all(v.shape == () and v.isfinite() and v.requires_grad for v in losses.values())
    assert sorted(method.figures) == sorted(f"{p.name}.gamma" for p in MIXED)
    assert all(0 < v < 1 and not v.requires_grad for v in method.figures.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in method.parameters())


def test_method_gives_features_only_an_autoencoder():
    method, losses = method_run(latent_channels=LATENT)
    rebuilt = {name.rpartition(".")[0] for name in losses if name.endswith(".reconstruction")}
    assert rebuilt == {"layer4.1", "keys"}
    assert {f"{p.name}.{kind}" for p in MIXED for kind in ("kd", "diffusion")} <= set(losses)
    kinds = [m.autoencoder is not None for m in method.modules() if isinstance(m, DiffKD)]
    assert kinds == [True, True, False, False, False]


def test_method_measures_logits_by_divergence_and_features_by_squares():
    method, _ = method_run()
    kinds = [m.distance for m in method.modules() if isinstance(m, DiffKD)]
    assert kinds == ["mse", "mse", "mse", "kl", "kl"]


def test_method_hands_its_options_on():
    method, _ = method_run(num_steps=2)
    inner = next(m for m in method.modules() if isinstance(m, DiffKD))
    calls = []
    inner.denoiser.register_forward_hook(lambda *_: calls.append(1))
    inner.denoise(torch.randn(2, STUDENT, 5, 4))
    assert len(calls) == 2
