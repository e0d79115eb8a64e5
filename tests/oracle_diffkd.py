"""DiffKD once more, as naively as it can be written: the reference that the tests compare with.

Plain functions on a `state_dict`. Only the order of the layers is taken from the module that is
checked, never its arithmetic: everything but the 3x3 convolutions is written out here.
"""

import math

import torch
from torch import nn
from torch.nn.functional import conv1d, conv2d, conv3d

PARTS = ("align", "autoencoder.encoder", "autoencoder.decoder", "denoiser", "noise_matcher", "projection")
CONV = {1: conv1d, 2: conv2d, 3: conv3d}
LEAVES = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
BN_EPS = 1e-5


def layout(module):
    """Per part of the module, the prefixes of its layers in the order of definition."""
    return {
        part: [
            f"{part}.{name}".rstrip(".") + "."
            for name, leaf in module.get_submodule(part).named_modules()
            if isinstance(leaf, LEAVES)
        ]
        for part in PARTS
        if _has(module, part)
    }


def _has(module, part):
    try:
        return isinstance(module.get_submodule(part), nn.Module)
    except AttributeError:
        return False


def alpha_bars(train_timesteps=1000):
    """prod(1 - beta), beta linear from 1e-4 to 0.02, in Python floats."""
    product, found = 1.0, []
    for i in range(train_timesteps):
        beta = 1e-4 + (0.02 - 1e-4) * i / (train_timesteps - 1)
        product *= 1.0 - beta
        found.append(product)
    return found


def conv1x1(state, layer, x):
    weight = state[layer + "weight"].flatten(1)
    y = torch.einsum("oc,bc...->bo...", weight, x)
    return y + over_positions(state[layer + "bias"], x)


def conv3x3(state, layer, x):
    return CONV[x.dim() - 2](x, state[layer + "weight"], state[layer + "bias"], padding=1)


def over_positions(vector, x):
    """A `(C,)` or `(B, C)` tensor with axes for the positions of x `(B, C, *S)`."""
    return vector.reshape(vector.shape + (1,) * (x.dim() - 2))


def batch_norm(state, layer, x, training):
    if training:
        axes = [0, *range(2, x.dim())]
        mean = x.mean(axes)
        var = ((x - over_positions(mean, x)) ** 2).mean(axes)
    else:
        mean, var = state[layer + "running_mean"], state[layer + "running_var"]
    normal = (x - over_positions(mean, x)) / torch.sqrt(over_positions(var, x) + BN_EPS)
    return normal * over_positions(state[layer + "weight"], x) + over_positions(state[layer + "bias"], x)


def relu(x):
    return torch.where(x > 0, x, torch.zeros_like(x))


def softmax(x):
    """Over axis 1."""
    e = torch.exp(x - x.detach().amax(1, keepdim=True))
    return e / e.sum(1, keepdim=True)


def bottleneck(state, layers, x, training):
    narrow, bn1, middle, bn2, wide, bn3 = layers
    y = relu(batch_norm(state, bn1, conv1x1(state, narrow, x), training))
    y = relu(batch_norm(state, bn2, conv3x3(state, middle, y), training))
    return batch_norm(state, bn3, conv1x1(state, wide, y), training) + x


def predict_noise(state, layers, x, t, training):
    """The denoiser. t: `(B,)`."""
    embedding, *body = layers
    x = x + over_positions(state[embedding + "weight"][t], x)
    if x.dim() == 2:
        up1, bn1, down1, bn2, up2, bn3, down2 = body
        x = relu(batch_norm(state, bn1, conv1x1(state, up1, x), training))
        x = batch_norm(state, bn2, conv1x1(state, down1, x), training)
        x = relu(batch_norm(state, bn3, conv1x1(state, up2, x), training))
        return conv1x1(state, down2, x)
    x = bottleneck(state, body[:6], x, training)
    x = bottleneck(state, body[6:12], x, training)
    last, bn = body[12:]
    return batch_norm(state, bn, conv1x1(state, last, x), training)


def match_noise(state, layers, z, training):
    """gamma, `(B,)`."""
    *body, linear = layers
    if z.dim() == 2:
        up, bn1, down, bn2 = body
        y = relu(batch_norm(state, bn1, conv1x1(state, up, z), training))
        y = batch_norm(state, bn2, conv1x1(state, down, y), training)
    else:
        y = bottleneck(state, body, z, training)
        y = y.flatten(2).mean(2)
    return softmax(conv1x1(state, linear, y))[:, 0]


def ddim(predict, x, num_steps=5, start_timestep=500, train_timesteps=1000):
    """x after the deterministic steps, and x after each of them. predict: `(x, t)` to noise."""
    bars = alpha_bars(train_timesteps)
    stride = start_timestep // num_steps
    trace = []
    for i in reversed(range(num_steps)):
        t = i * stride
        a = bars[t]
        a_prev = bars[t - stride] if t - stride >= 0 else 1.0
        noise = predict(x, t)
        x0 = (x - math.sqrt(1 - a) * noise) / math.sqrt(a)
        x = math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev) * noise
        trace.append(x)
    return x, trace


def denoise(state, layers, student, noise, *, training=True, frozen_denoiser=False, **steps):
    """The denoised student feature and gamma."""
    fixed = {k: v.detach() if frozen_denoiser else v for k, v in state.items()}

    def predict(x, t):
        times = torch.full((len(x),), t)
        return predict_noise(fixed, layers["denoiser"], x, times, training)

    z = conv1x1(state, layers["align"][0], student)
    gamma = match_noise(state, layers["noise_matcher"], z, training)
    share = gamma.reshape(-1, *[1] * (z.dim() - 1))
    x, _ = ddim(predict, share * z + (1 - share) * noise, **steps)
    conv, bn = layers["projection"]
    return batch_norm(state, bn, conv1x1(state, conv, x), training), gamma


def add_noise(target, noise, timesteps, train_timesteps=1000):
    bars = alpha_bars(train_timesteps)
    rows = [
        math.sqrt(bars[t]) * target[i] + math.sqrt(1 - bars[t]) * noise[i]
        for i, t in enumerate(timesteps.tolist())
    ]
    return torch.stack(rows)


def diffusion_loss(state, layers, target, noise, timesteps, *, training=True, train_timesteps=1000):
    noisy = add_noise(target, noise, timesteps, train_timesteps)
    return ((predict_noise(state, layers["denoiser"], noisy, timesteps, training) - noise) ** 2).mean()


def encode(state, layers, teacher, training):
    if "autoencoder.encoder" not in layers:
        return teacher
    conv, bn = layers["autoencoder.encoder"]
    return batch_norm(state, bn, conv1x1(state, conv, teacher), training)


def reconstruction_loss(state, layers, teacher, training):
    if "autoencoder.encoder" not in layers:
        return torch.zeros((), dtype=teacher.dtype)
    (conv,) = layers["autoencoder.decoder"]
    return ((teacher - conv1x1(state, conv, encode(state, layers, teacher, training))) ** 2).mean()


def distance(kind, denoised, target):
    if kind == "mse":
        return ((denoised - target) ** 2).mean()
    p, q = softmax(target), softmax(denoised)
    per_position = (p * (p.log() - q.log())).sum(1)
    # Every position of a map is a sample of its own; temperature 1, so tau^2 is 1.
    return per_position.mean()


def forward(
    state,
    layers,
    student,
    teacher,
    noise,
    diffusion_noise,
    timesteps,
    *,
    kind="mse",
    training=True,
    detach_denoiser=False,
    num_steps=5,
    start_timestep=500,
    train_timesteps=1000,
):
    """One training step: all that the module hands out, by name."""
    target = encode(state, layers, teacher, training).detach()
    denoised, gamma = denoise(
        state,
        layers,
        student,
        noise,
        training=training,
        frozen_denoiser=detach_denoiser,
        num_steps=num_steps,
        start_timestep=start_timestep,
        train_timesteps=train_timesteps,
    )
    out = {
        "denoised": denoised,
        "target": target,
        "gamma": gamma,
        "kd_loss": distance(kind, denoised, target),
        "diffusion_loss": diffusion_loss(
            state,
            layers,
            target,
            diffusion_noise,
            timesteps,
            training=training,
            train_timesteps=train_timesteps,
        ),
        "reconstruction_loss": reconstruction_loss(state, layers, teacher, training),
    }
    out["loss"] = out["kd_loss"] + out["diffusion_loss"] + out["reconstruction_loss"]
    return out
