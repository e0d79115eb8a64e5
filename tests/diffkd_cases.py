"""DiffKD modules and features that the tests share."""

import itertools

import torch
from torch import nn

from diffkd import DiffKD

STUDENT, TEACHER, LATENT, BATCH = 5, 24, 16, 3
POSITIONS = {0: (), 1: (6,), 2: (5, 4), 3: (3, 4, 2)}
DIMS = list(POSITIONS)
# spatial_dims, latent_channels, distance: vectors have no autoencoder.
CASES = [
    (dims, latent, kind)
    for dims, latent, kind in itertools.product(DIMS, (None, LATENT), ("mse", "kl"))
    if dims or latent is None
]


def build(dims=2, latent=None, *, student=STUDENT, teacher=TEACHER, dtype=torch.float32, seed=0, **options):
    """A DiffKD, the paper's if not said otherwise; no weight or statistic has a special value."""
    torch.manual_seed(seed)
    options = {"preset": "paper", **options}
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


def gradient(parameter):
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
