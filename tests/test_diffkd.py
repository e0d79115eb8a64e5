import copy
import functools
import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import oracle_diffkd as oracle
from diffkd import DiffKD
from diffkd_cases import BATCH, CASES, DIMS, LATENT, POSITIONS, STUDENT, TEACHER, build, features, gradient


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
    found, wanted = run_both(module, *features(dims, batch=8, dtype=torch.float64), kind=kind)
    assert found["loss"].dtype == torch.float64
    for key, value in wanted.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize(("dims", "latent", "kind"), CASES)
def test_outputs_and_gradients_are_the_papers_in_float32(dims, latent, kind):
    found, wanted = run_both(build(dims, latent, distance=kind), *features(dims, batch=8), kind=kind)
    assert found["loss"].dtype == torch.float32
    assert_close(found, wanted, 1e-4)


@pytest.mark.parametrize("dims", [0, 2])
def test_other_numbers_of_steps_are_the_papers_too(dims):
    steps = {"num_steps": 3, "start_timestep": 60, "train_timesteps": 80}
    module = build(dims, dtype=torch.float64, **steps)
    found, wanted = run_both(module, *features(dims, dtype=torch.float64), **steps)
    for key, value in wanted.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("dims", DIMS)
def test_detach_denoiser_stops_kd_at_the_denoisers_weights(dims):
    module = build(dims, dtype=torch.float64, detach_denoiser=True)
    inputs = features(dims, dtype=torch.float64)
    found, wanted = run_both(module, *inputs, detach_denoiser=True)
    for key, value in wanted.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}"
        )

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


def test_every_sample_gets_a_timestep_of_its_own_from_the_whole_range():
    module = build(0, train_timesteps=40, start_timestep=20)
    target = torch.zeros(2000, TEACHER)
    with Draws() as draws:
        module.diffusion_loss(target)
    (timesteps,) = draws.timesteps
    assert timesteps.shape == (2000,)
    assert timesteps.unique().tolist() == list(range(40))
    (noise,) = draws.noise
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


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


# Does it learn?


def low_rank(count, seed, channels=32, rank=2):
    """Samples `(count, C, 3, 3)` of unit variance on a plane of two dimensions."""
    basis = torch.linalg.qr(torch.randn(channels, rank, generator=torch.Generator().manual_seed(99)))[0]
    weights = torch.randn(count, rank, 3, 3, generator=torch.Generator().manual_seed(seed))
    return torch.einsum("cr,bruv->bcuv", basis, weights) * math.sqrt(channels / rank)


@pytest.fixture(scope="module")
def trained():
    """A module trained on the diffusion loss alone, and its losses."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = DiffKD(32, 32, preset="paper")
    optimizer = torch.optim.Adam(module.denoiser.parameters(), 2e-2)
    losses = []
    for step in range(400):
        loss = module.diffusion_loss(low_rank(256, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return module, losses


def test_diffusion_loss_falls_on_a_fixed_distribution(trained):
    _, losses = trained
    last = sum(losses[-20:]) / 20
    assert last < losses[0] / 4
    assert last < 0.3, "a denoiser that always answers zero has 1"


def test_denoised_noisy_teacher_samples_are_nearer_to_the_clean_ones(trained):
    module = copy.deepcopy(trained[0]).eval()
    # All but the diffusion model is made to hand its input through.
    with torch.no_grad():
        for conv in (module.align, module.projection[0]):
            conv.weight.copy_(torch.eye(32)[..., None, None])
            conv.bias.zero_()
        gate = next(m for m in module.noise_matcher.modules() if isinstance(m, nn.Linear))
        gate.weight.zero_()
        gate.bias.copy_(torch.tensor([40.0, -40.0]))
    clean = low_rank(64, 12345)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7))
    noisy = oracle.add_noise(clean, noise, torch.full((64,), 400))
    with torch.no_grad():
        denoised = module.denoise(noisy, noise=torch.zeros_like(clean))
    before, after = ((x - clean).square().mean((1, 2, 3)) for x in (noisy, denoised))
    assert (after < before).all()
    assert after.mean() < 0.5 * before.mean()
