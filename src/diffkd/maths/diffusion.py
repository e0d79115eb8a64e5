"""The noise schedule, adding noise, and the deterministic denoising step, as pure functions."""

import math

import torch
from torch import Tensor


def alpha_bars(timesteps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """`alpha_bar_t = prod(1 - beta)` of the linear schedule, `(timesteps,)` in float64 on the CPU.

    >>> alpha_bars(1000)[[0, 999]]
    tensor([9.9990e-01, 4.0358e-05], dtype=torch.float64)
    """
    betas = torch.linspace(first, last, timesteps, dtype=torch.float64, device="cpu")
    return torch.cumprod(1 - betas, 0)


def noise_like(feature: Tensor) -> Tensor:
    """Noise of a feature's shape, contiguous: drawing in channels_last takes six times as long."""
    return torch.randn(feature.shape, dtype=feature.dtype, device=feature.device)


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Forward process: `sqrt(a) x + sqrt(1 - a) eps`, with one `alpha_bar` `(B,)` per sample."""
    a = alpha_bar.view(-1, *[1] * (clean.dim() - 1))
    return a.sqrt() * clean + (1 - a).sqrt() * noise


def ddim_step(noisy: Tensor, noise: Tensor, alpha_bar: float, alpha_bar_next: float) -> Tensor:
    """One DDIM step with eta = 0 and no clipping, from the predicted noise.

    Args:
        noisy: `(B, C, *S)` at the present timestep.
        noise: the noise that the model sees in it, of the same shape.
        alpha_bar: at the present timestep.
        alpha_bar_next: at the next one; 1 where it is the last.
    """
    # sqrt(a') x0 + sqrt(1 - a') e with x0 = (x - sqrt(1 - a) e) / sqrt(a), gathered by x and e.
    keep = math.sqrt(alpha_bar_next / alpha_bar)
    return torch.add(
        keep * noisy, noise, alpha=math.sqrt(1 - alpha_bar_next) - keep * math.sqrt(1 - alpha_bar)
    )


def ddim_timesteps(num_steps: int, start: int) -> list[int]:
    """Timesteps at which the denoiser is evaluated.

    >>> ddim_timesteps(5, 500)
    [400, 300, 200, 100, 0]
    """
    stride = start // num_steps
    return [stride * k for k in reversed(range(num_steps))]
