"""The networks of DiffKD: denoiser, noise matcher, autoencoder, as the paper has them."""

from torch import Tensor, nn

from diffkd.maths.layers import conv, norm, pooled


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

    def forward(self, noisy: Tensor, code: Tensor) -> Tensor:
        """The noise, given the timestep's code: `(C,)`, or `(B, C)` where samples differ."""
        spatial = noisy.dim() - 2
        found: Tensor = self.body(noisy + code.view(*code.shape, *[1] * spatial))
        return found


class NoiseMatcher(nn.Module):
    """How much of the feature to keep before noise is mixed in: `(B, C, *S)` to `(B,)`.

    Args:
        dims: number of spatial axes.
        channels: C.
    """

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.body = Bottleneck(dims, channels, 8) if dims else _vector_matcher(channels)
        self.head = nn.Linear(channels, 2)

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
