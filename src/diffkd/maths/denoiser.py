"""The networks of DiffKD: denoiser, noise matcher, autoencoder as the paper has them; a standardizer."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffkd.maths.layers import conv, norm, pooled, without_void


class Denoiser(nn.Module):
    """Predicts the noise in a noisy feature: `(B, C, *S)` to `(B, C, *S)`.

    Args:
        dims: number of spatial axes.
        channels: C.
        timesteps: number of timesteps that have an embedding.
    """

    def __init__(self, dims: int, channels: int, timesteps: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(timesteps, channels)
        self.body = _vector_denoiser(channels) if dims == 0 else _map_denoiser(dims, channels)

    def forward(self, noisy: Tensor, code: Tensor | None) -> Tensor:
        """The noise, given the timestep's code: `(C,)`, or `(B, C)` where samples differ; None for none."""
        if code is not None:
            noisy = noisy + code.view(*code.shape, *[1] * (noisy.dim() - 2))
        found: Tensor = self.body(noisy)
        return found


def with_fixed_weights(denoiser: Denoiser) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The denoiser, through which a gradient passes but to whose weights none goes."""
    fixed = {name: weight.detach() for name, weight in denoiser.named_parameters()}
    return lambda noisy, code: functional_call(
        denoiser, fixed, (noisy, None if code is None else code.detach())
    )


class NoiseMatcher(nn.Module):
    """How much of the feature to keep before noise is mixed in: `(B, C, *S)` to `(B,)`.

    Args:
        dims: number of spatial axes.
        channels: C.
        first: what it answers for every feature at the start; None leaves that to chance.
    """

    def __init__(self, dims: int, channels: int, first: float | None = None) -> None:
        super().__init__()
        self.body = Bottleneck(dims, channels, 8) if dims else _vector_matcher(channels)
        self.head = nn.Linear(channels, 2)
        if first is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, math.log(first / (1 - first)) / 2)
            with torch.no_grad():
                self.head.bias[1].neg_()

    def forward(self, feature: Tensor, valid: Tensor | None = None) -> Tensor:
        """Gamma, between 0 and 1, from the valid positions `(B, *S)`; None for all."""
        logits: Tensor = self.head(pooled(self.body(feature), valid))
        return logits.softmax(1)[:, 0]


class Autoencoder(nn.Module):
    """Brings the teacher's feature into a narrower space, and back.

    Args:
        dims: number of spatial axes.
        teacher_channels: of the teacher's feature.
        channels: of the narrower space.
    """

    def __init__(self, dims: int, teacher_channels: int, channels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(dims, teacher_channels, channels), norm(dims, channels))
        self.decoder = conv(dims, channels, teacher_channels)

    def forward(self, feature: Tensor) -> Tensor:
        """The feature rebuilt."""
        rebuilt: Tensor = self.decoder(self.encoder(feature))
        return rebuilt


class Standardizer(nn.Module):
    """Brings features `(B, C, *S)` to mean 0 and variance 1 per channel, which the noise schedule expects.

    By running moments: each batch counts the same until a hundred are seen, then one in a hundred.

    Args:
        channels: C.

    >>> standardizer = Standardizer(3)
    >>> torch.std_mean(standardizer(7 + 50 * torch.randn(64, 3, 8, 8)))[0].round(decimals=1)
    tensor(1.)
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("batches", torch.tensor(0.0))

    def forward(self, feature: Tensor, valid: Tensor | None = None) -> Tensor:
        """The feature in its new scale, taken in first while training; 0 where `(B, *S)` is False."""
        if self.training:
            self._take_in(feature.detach(), valid)
        # Channels that hardly vary stay small: they carry rounding and nothing to learn.
        scale = (self.variance + 1e-3 * self.variance.mean() + 1e-12).rsqrt()
        mean, scale = (x.view(-1, *[1] * (feature.dim() - 2)) for x in (self.mean, scale))
        return without_void(((feature - mean) * scale).to(feature.dtype), valid)

    def _take_in(self, feature: Tensor, valid: Tensor | None) -> None:
        values = feature.to(self.mean.dtype).movedim(1, -1)  # (B, *S, C)
        share = torch.ones_like(values) if valid is None else valid[..., None].expand_as(values).to(values)
        axes = tuple(range(values.dim() - 1))
        count = share.sum(axes).clamp(min=1)
        mean = (values * share).sum(axes) / count
        variance = ((values - mean).square() * share).sum(axes) / count
        self.batches += 1
        weight = (1 / self.batches).clamp(min=0.01)
        between = (mean - self.mean).square() * weight
        self.variance.copy_(torch.lerp(self.variance + between, variance, weight))
        self.mean.copy_(torch.lerp(self.mean, mean, weight))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolution with BatchNorm, plus the input; no activation after the sum.

    Args:
        dims: number of spatial axes.
        channels: in and out.
        reduction: by how much the middle is narrower.
    """

    def __init__(self, dims: int, channels: int, reduction: int) -> None:
        super().__init__()
        middle = max(1, channels // reduction)
        self.body = nn.Sequential(
            conv(dims, channels, middle),
            norm(dims, middle),
            nn.ReLU(),
            conv(dims, middle, middle, 3),
            norm(dims, middle),
            nn.ReLU(),
            conv(dims, middle, channels),
            norm(dims, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, *S)` to the same shape."""
        out: Tensor = self.body(x) + x
        return out


def _map_denoiser(dims: int, channels: int) -> nn.Module:
    return nn.Sequential(
        Bottleneck(dims, channels, 4),
        Bottleneck(dims, channels, 4),
        conv(dims, channels, channels),
        norm(dims, channels),
    )


def _vector_denoiser(channels: int) -> nn.Module:
    wide = 4 * channels
    return nn.Sequential(
        *_hidden_layer(channels, wide),
        norm(0, channels),
        *_hidden_layer(channels, wide),
    )


def _vector_matcher(channels: int) -> nn.Module:
    return nn.Sequential(*_hidden_layer(channels, 2 * channels), norm(0, channels))


def _hidden_layer(channels: int, wide: int) -> tuple[nn.Module, ...]:
    return nn.Linear(channels, wide), norm(0, wide), nn.ReLU(), nn.Linear(wide, channels)


class DiffKDOutput(NamedTuple):
    """What one forward pass of DiffKD gives.

    Attributes:
        denoised: the student's feature after denoising and projection, `(B, C, *S)`.
        target: what it is matched with, detached, `(B, C, *S)`.
        loss: the sum of the three losses, a scalar.
        kd_loss: distance of denoised and target.
        diffusion_loss: how well the denoiser predicts the noise in the teacher's features.
        reconstruction_loss: the autoencoder's; 0 without one.
        gamma: share of the student's own feature in the denoiser's input, `(B,)`, 0 to 1.
    """

    denoised: Tensor
    target: Tensor
    loss: Tensor
    kd_loss: Tensor
    diffusion_loss: Tensor
    reconstruction_loss: Tensor
    gamma: Tensor
