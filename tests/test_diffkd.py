import copy
import functools
import itertools
import math
import warnings

import oracle_diffkd as oracle
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from diffkd import DiffKD
from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.methods.base import Feature, Method, Pair, Setup, method_class

STUDENT, TEACHER, LATENT, BATCH = 5, 16, 8, 3
POSITIONS = {0: (), 1: (6,), 2: (5, 4), 3: (3, 4, 2)}
DIMS = list(POSITIONS)
# spatial_dims, latent_channels, distance: vectors have no autoencoder.
CASES = [
    (dims, latent, kind)
    for dims, latent, kind in itertools.product(DIMS, (None, LATENT), ("mse", "kl"))
    if dims or latent is None
]


def build(dims=2, latent=None, *, student=STUDENT, teacher=TEACHER, dtype=torch.float32, seed=0, **options):
    """A DiffKD none of whose weights and statistics has a special value."""
    torch.manual_seed(seed)
    module = DiffKD(student, teacher, latent_channels=latent, spatial_dims=dims, **options)
    with torch.no_grad():
        for leaf in module.modules():
            if isinstance(leaf, nn.modules.batchnorm._BatchNorm):
                leaf.weight.uniform_(0.5, 1.5)
                leaf.bias.normal_(0, 0.3)
                leaf.running_mean.normal_(0, 0.3)
                leaf.running_var.uniform_(0.5, 1.5)
    return module.to(dtype)


def features(dims=2, *, student=STUDENT, teacher=TEACHER, batch=BATCH, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, channels, *POSITIONS[dims], generator=generator).to(dtype)
        for channels in (student, teacher)
    ]


class Draws(TorchFunctionMode):
    """Remembers the random tensors that are drawn while it is on."""

    SOURCES = (torch.randn_like, torch.randn, torch.randint, torch.rand, torch.normal)

    def __init__(self):
        super().__init__()
        self.noise, self.timesteps = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        value = func(*args, **(kwargs or {}))
        if func in self.SOURCES:
            (self.noise if value.is_floating_point() else self.timesteps).append(value)
        return value


def double_state(module):
    """The state in float64, with gradients for the parameters only."""
    names = dict(module.named_parameters())
    return {
        key: value.detach().double().requires_grad_() if key in names else value.detach().clone().double()
        for key, value in module.state_dict().items()
        if value.is_floating_point()
    }


def run_both(module, student, teacher, **options):
    """The module's outputs and gradients, and the oracle's in float64, for the same random draws."""
    expected_state = double_state(module)
    ours = student.clone().requires_grad_()
    with Draws() as draws:
        out = module(ours, teacher)
    out.loss.backward()
    noise, diffusion_noise = (draw.double() for draw in draws.noise)
    (timesteps,) = draws.timesteps
    theirs = student.double().requires_grad_()
    expected = oracle.forward(
        expected_state,
        oracle.layout(module),
        theirs,
        teacher.double(),
        noise,
        diffusion_noise,
        timesteps,
        training=module.training,
        **options,
    )
    expected["loss"].backward()
    found = {key: getattr(out, key).detach() for key in expected}
    found |= {f"d {k}": gradient(p) for k, p in module.named_parameters()} | {"d student": ours.grad}
    wanted = {key: value.detach() for key, value in expected.items()}
    wanted |= {f"d {k}": gradient(expected_state[k]) for k, _ in module.named_parameters()}
    return found, wanted | {"d student": theirs.grad}


def gradient(parameter):
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def assert_close(found, wanted, relative):
    """Each tensor to `relative` of its own largest entry.

    A gradient that is zero but for rounding (a bias in front of a BatchNorm) has no size of its own: it
    is measured by the largest gradient.
    """
    assert found.keys() == wanted.keys()
    largest = max(value.abs().max() for key, value in wanted.items() if key.startswith("d "))
    for key, value in wanted.items():
        size = value.abs().max()
        scale = largest if key.endswith(".bias") and size < 1e-12 else size
        error = (found[key].double() - value).abs().max()
        assert error <= relative * scale, f"{key}: off by {error:.2e} of {scale:.2e}"


@pytest.fixture(autouse=True)
def _one_thread(_quiet_machine):
    torch.set_num_threads(1)


# The method, against the oracle


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("dims", "latent", "kind"), CASES)
def test_outputs_and_gradients_are_the_papers_in_float64(dims, latent, kind, training):
    module = build(dims, latent, dtype=torch.float64, distance=kind).train(training)
    found, wanted = run_both(module, *features(dims, dtype=torch.float64), kind=kind)
    assert found["loss"].dtype == torch.float64
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("dims", "latent", "kind"), CASES)
def test_outputs_and_gradients_are_the_papers_in_float32(dims, latent, kind):
    found, wanted = run_both(build(dims, latent, distance=kind), *features(dims), kind=kind)
    assert found["loss"].dtype == torch.float32
    assert_close(found, wanted, 1e-4)


@pytest.mark.parametrize("dims", [0, 2])
def test_other_numbers_of_steps_are_the_papers_too(dims):
    steps = {"num_steps": 3, "start_timestep": 60, "train_timesteps": 80}
    module = build(dims, dtype=torch.float64, **steps)
    found, wanted = run_both(module, *features(dims, dtype=torch.float64), **steps)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("dims", DIMS)
def test_detach_denoiser_stops_kd_at_the_denoisers_weights(dims):
    module = build(dims, dtype=torch.float64, detach_denoiser=True)
    inputs = features(dims, dtype=torch.float64)
    found, wanted = run_both(module, *inputs, detach_denoiser=True)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")

    module.zero_grad()
    student = inputs[0].requires_grad_()
    module(student, inputs[1]).kd_loss.backward()
    assert not any(gradient(p).any() for p in module.denoiser.parameters())
    assert student.grad.any()
    for part in (module.align, module.noise_matcher, module.projection):
        assert any(gradient(p).abs().max() > 1e-8 for p in part.parameters())
    module.zero_grad()
    module(*inputs).diffusion_loss.backward()
    assert any(gradient(p).any() for p in module.denoiser.parameters())


@pytest.mark.parametrize("dims", DIMS)
def test_kd_loss_trains_student_and_all_modules_on_its_way(dims):
    module = build(dims, LATENT if dims else None)
    student, teacher = features(dims)
    teacher.requires_grad_()
    module(student.requires_grad_(), teacher).kd_loss.backward()
    assert student.grad.any()
    for part in (module.align, module.denoiser, module.noise_matcher, module.projection):
        assert all(p.grad is not None for p in part.parameters())
        assert any(p.grad.abs().max() > 1e-6 for p in part.parameters())


@pytest.mark.parametrize(("dims", "latent"), [(0, None), (2, None), (2, LATENT)])
@pytest.mark.parametrize("loss", ["kd_loss", "diffusion_loss"])
def test_target_is_detached(dims, latent, loss):
    module = build(dims, latent)
    student, teacher = features(dims)
    teacher.requires_grad_()
    out = module(student, teacher)
    assert not out.target.requires_grad
    getattr(out, loss).backward()
    assert teacher.grad is None or not teacher.grad.any()
    if latent:
        assert not any(gradient(p).any() for p in module.autoencoder.parameters())


def test_losses_add_up_and_parts_are_those_asked_for():
    out = build(2, LATENT)(*features())
    torch.testing.assert_close(out.loss, out.kd_loss + out.diffusion_loss + out.reconstruction_loss)
    assert out.denoised.shape == out.target.shape == (BATCH, LATENT, *POSITIONS[2])
    assert out.reconstruction_loss > 0
    assert out.gamma.shape == (BATCH,)
    assert ((out.gamma > 0) & (out.gamma < 1)).all()
    out = build()(*features())
    assert out.reconstruction_loss == 0
    assert torch.equal(out.target, features()[1])
    assert out.denoised.shape == (BATCH, TEACHER, *POSITIONS[2])


@pytest.mark.parametrize("dims", DIMS)
def test_layers_are_those_of_the_papers_table(dims):
    module = build(dims, LATENT if dims else None)
    width = LATENT if dims else TEACHER
    shapes = {
        part: [tuple(module.get_parameter(f"{layer}weight").shape) for layer in layers]
        for part, layers in oracle.layout(module).items()
    }
    one, three = (1,) * dims, (3,) * dims

    def conv(c_in, c_out, kernel=one):
        return (c_out, c_in, *kernel)

    def bottleneck(reduction):
        c = width // reduction
        return [conv(width, c), (c,), conv(c, c, three), (c,), conv(c, width), (width,)]

    assert shapes["align"] == [conv(STUDENT, width)]
    assert shapes["projection"] == [conv(width, width), (width,)]
    if dims:
        assert shapes["autoencoder.encoder"] == [conv(TEACHER, width), (width,)]
        assert shapes["autoencoder.decoder"] == [conv(width, TEACHER)]
        body = [*bottleneck(4), *bottleneck(4), conv(width, width), (width,)]
        matcher = bottleneck(8)
    else:
        up, down = (4 * width, width), (width, 4 * width)
        body = [up, (4 * width,), down, (width,), up, (4 * width,), down]
        matcher = [(2 * width, width), (2 * width,), (width, 2 * width), (width,)]
    assert shapes["denoiser"] == [(1000, width), *body]
    assert shapes["noise_matcher"] == [*matcher, (2, width)]
    counted = sum(len(layers) for layers in shapes.values())
    assert counted == sum(isinstance(leaf, oracle.LEAVES) for leaf in module.modules())


def test_bias_is_everywhere():
    for dims in DIMS:
        module = build(dims, LATENT if dims else None)
        for leaf in module.modules():
            if isinstance(leaf, oracle.LEAVES) and not isinstance(leaf, nn.Embedding):
                assert leaf.bias is not None


# Its parts, called alone


@pytest.mark.parametrize("dims", DIMS)
def test_denoise_and_diffusion_loss_take_their_noise(dims):
    module = build(dims, dtype=torch.float64).eval()
    student, teacher = features(dims, dtype=torch.float64)
    noise = torch.randn(teacher.shape, dtype=torch.float64)
    timesteps = torch.tensor([0, 999, 412])
    state, layers = module.state_dict(), oracle.layout(module)
    wanted, _ = oracle.denoise(state, layers, student, noise, training=False)
    torch.testing.assert_close(module.denoise(student, noise=noise), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        module.diffusion_loss(teacher, noise=noise, timesteps=timesteps),
        oracle.diffusion_loss(state, layers, teacher, noise, timesteps, training=False),
        rtol=1e-10,
        atol=1e-10,
    )


def test_denoising_is_diffusers_ddim_step_by_step():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="leading",
    )
    bars = torch.tensor(oracle.alpha_bars(), dtype=torch.float64)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), bars, rtol=1e-5, atol=1e-7)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = bars, torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(10)
    times = scheduler.timesteps[-5:].tolist()
    assert times == [400, 300, 200, 100, 0]

    module = build(dtype=torch.float64).eval()
    student, teacher = features(dtype=torch.float64)
    noise = torch.randn(teacher.shape, dtype=torch.float64)
    seen = []
    module.denoiser.register_forward_hook(lambda m, inputs, output: seen.append((inputs[0], output)))
    found = module.denoise(student, noise=noise)

    assert len(seen) == 5
    x = seen[0][0]
    for t, (entered, predicted) in zip(times, seen, strict=True):
        torch.testing.assert_close(entered, x, rtol=1e-10, atol=1e-10)
        x = scheduler.step(predicted, t, x, eta=0.0).prev_sample
    torch.testing.assert_close(found, module.projection(x), rtol=1e-10, atol=1e-10)


def test_noising_is_diffusers_too():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    module = build().eval()
    teacher = features()[1]
    noise, timesteps = torch.randn_like(teacher), torch.tensor([3, 500, 999])
    seen = []
    module.denoiser.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    module.diffusion_loss(teacher, noise=noise, timesteps=timesteps)
    torch.testing.assert_close(seen[0], scheduler.add_noise(teacher, noise, timesteps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", [0, 1, 2])
def test_gradcheck(dims):
    module = build(dims, student=2, teacher=4, dtype=torch.float64, num_steps=2)
    shape = {0: (), 1: (3,), 2: (2, 2)}[dims]
    generator = torch.Generator().manual_seed(3)
    student, teacher, noise = (
        torch.randn(3, c, *shape, dtype=torch.float64, generator=generator) for c in (2, 4, 4)
    )
    names = [name for name, p in module.named_parameters() if p.numel() < 40]
    parameters = [module.get_parameter(name).detach().clone().requires_grad_() for name in names]
    fixed = {name: b for name, b in module.state_dict().items() if name not in names}

    def losses(feature, *values):
        call = functools.partial(torch.func.functional_call, Calls(module), strict=False)
        state = {f"module.{k}": v for k, v in {**fixed, **dict(zip(names, values, strict=True))}.items()}
        return call(state, (feature, teacher, noise, torch.tensor([5, 300, 800])))

    assert torch.autograd.gradcheck(losses, (student.requires_grad_(), *parameters), fast_mode=True)


class Calls(nn.Module):
    """Both parts of the method that draw, with what they draw given."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, student, target, noise, timesteps):
        denoised = self.module.denoise(student, noise=noise)
        return denoised, self.module.diffusion_loss(target, noise=noise, timesteps=timesteps)


# Sizes, batches, number formats


def resized(dims, size):
    return torch.randn(BATCH, TEACHER, *[size] * dims, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("larger", ["student", "teacher"])
@pytest.mark.parametrize("latent", [None, LATENT])
def test_unequal_sizes_are_matched_and_told_once(dims, larger, latent):
    module = build(dims, latent, student=TEACHER)
    student, teacher = resized(dims, 8 if larger == "student" else 4), resized(dims, 4 if larger == "student" else 8)
    student.requires_grad_()
    with pytest.warns(UserWarning) as told:  # noqa: PT030
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


def test_equal_sizes_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build()(*features())


@pytest.mark.parametrize("dims", DIMS)
def test_a_map_twice_as_large_is_averaged(dims):
    if dims == 0:
        pytest.skip("vectors have no size")
    module = build(dims)
    teacher = resized(dims, 8)
    student = torch.randn(BATCH, STUDENT, *[4] * dims)
    with pytest.warns(UserWarning):  # noqa: PT030
        target = module(student, teacher).target
    pool = getattr(torch.nn.functional, f"avg_pool{dims}d")
    torch.testing.assert_close(target, pool(teacher, 2))


@pytest.mark.parametrize("positions", [(), (1,), (4,), (1, 1), (3, 2), (1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("latent", [None, LATENT])
def test_batch_of_one_trains(positions, latent):
    if not positions and latent:
        pytest.skip("vectors have no autoencoder")
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
    torch.manual_seed(0)
    exact = build(dims, latent, distance=kind).diffusion_loss(teacher[:, :LATENT] if latent else teacher)
    assert (out.diffusion_loss - exact).abs() < 0.7 * exact


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
    module = build(2).eval()
    inputs = torch.randn(2, STUDENT, 4, 4), torch.randn(2, TEACHER, 8, 8)
    torch.manual_seed(5)
    compiled = torch.compile(module, fullgraph=True, backend="eager")(*inputs).loss
    torch.manual_seed(5)
    torch.testing.assert_close(compiled, module(*inputs).loss)


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


# Does it learn?


def low_rank(count, seed, channels=16, rank=2):
    """Samples `(count, C, 4, 4)` of unit variance on a plane of two dimensions."""
    basis = torch.linalg.qr(torch.randn(channels, rank, generator=torch.Generator().manual_seed(99)))[0]
    weights = torch.randn(count, rank, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.einsum("cr,bruv->bcuv", basis, weights) * math.sqrt(channels / rank)


@pytest.fixture(scope="module")
def trained():
    """A module trained on the diffusion loss alone, and its losses."""
    torch.manual_seed(0)
    module = DiffKD(16, 16)
    optimizer = torch.optim.Adam(module.denoiser.parameters(), 3e-3)
    losses = []
    for step in range(400):
        loss = module.diffusion_loss(low_rank(32, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return module, losses


def test_diffusion_loss_falls_on_a_fixed_distribution(trained):
    _, losses = trained
    assert sum(losses[-20:]) / 20 < 0.5 * sum(losses[:5]) / 5
    assert sum(losses[-20:]) / 20 < 0.5, "half of what a denoiser that always answers zero gets"


def test_denoised_noisy_teacher_samples_are_nearer_to_the_clean_ones(trained):
    module = copy.deepcopy(trained[0]).eval()
    # All but the diffusion model is made to hand its input through.
    with torch.no_grad():
        for conv in (module.align, *module.projection):
            if getattr(conv, "weight", torch.zeros(1)).dim() > 1:
                conv.weight.copy_(torch.eye(16)[..., None, None])
                conv.bias.zero_()
        linear = [m for m in module.noise_matcher.modules() if isinstance(m, nn.Linear)][-1]
        linear.weight.zero_()
        linear.bias.copy_(torch.tensor([40.0, -40.0]))
    clean = low_rank(64, 12345)
    noisy = oracle.add_noise(clean, torch.randn_like(clean), torch.full((64,), 400))
    with torch.no_grad():
        denoised = module.denoise(noisy, noise=torch.zeros_like(clean))
    before, after = ((x - clean).square().mean((1, 2, 3)) for x in (noisy, denoised))
    assert (after < before).all()
    assert after.mean() < 0.5 * before.mean()


# As a method of a run


def setup(**kinds):
    pairs = tuple(
        Pair(name, Feature(name, (STUDENT, *shape)), Feature(name, (TEACHER, *shape)))
        for name, shape in kinds.items()
    )
    return pairs


MIXED = (
    Pair("layer4.1", Feature("layer4.1", (STUDENT, 5, 4)), Feature("layer4.2", (TEACHER, 5, 4))),
    Pair("keys", Feature("keys", (STUDENT, 6)), Feature("keys", (TEACHER, 6))),
    Pair("pooled", Feature("pooled", (STUDENT,)), Feature("pooled", (TEACHER,))),
    Pair("output", Feature("", (10,)), Feature("", (10,)), is_logits=True),
)


def method_run(pairs=MIXED, batch=BATCH, **options):
    torch.manual_seed(0)
    method = method_class("diffkd")(Setup(pairs, nn.Identity(), nn.Identity()), **options)
    student, teacher = (
        {p.name: torch.randn(batch, *getattr(p, side).shape) for p in pairs} for side in ("student", "teacher")
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
    assert kinds == [True, True, False, False]


def test_method_measures_logits_by_divergence_and_features_by_squares():
    method, _ = method_run()
    kinds = [m.distance for m in method.modules() if isinstance(m, DiffKD)]
    assert kinds == ["mse", "mse", "mse", "kl"]


def test_method_hands_its_options_on():
    method, _ = method_run(num_steps=2)
    inner = next(m for m in method.modules() if isinstance(m, DiffKD))
    calls = []
    inner.denoiser.register_forward_hook(lambda *_: calls.append(1))
    inner.denoise(torch.randn(2, STUDENT, 5, 4))
    assert len(calls) == 2
