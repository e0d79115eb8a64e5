"""DiffKD's settings where the user names none: as the paper has them, and as they serve on small data."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from diffkd.errors import UserError, nearest
from diffkd.maths.losses import usual_temperature

PresetName = Literal["robust", "paper"]
DISTANCES = ("mse", "kl")


@dataclass(frozen=True)
class Settings:
    """How one pair of features is diffused, denoised and compared.

    Attributes:
        num_steps: evaluations of the denoiser per forward pass.
        start_timestep: how noisy the student's feature is taken to be.
        detach_denoiser: the distance's gradient stops at the denoiser's weights.
        temperature: of the divergence of class scores.
        warmup: share of the run in which no gradient of the distance reaches the student.
        fade: after the warm-up, the share of the distance's gradient that reaches the student falls to
            nothing at the run's end.
        standardize: brings the teacher's feature to mean 0 and variance 1 per channel, which is what
            the noise schedule takes for granted.
        first_gamma: share of the student's feature that is kept at the start; None leaves it to chance
            (about one half).
        latent_limit: widest map that is compared without an autoencoder; None has no limit.
        time_code: the denoiser is told the timestep in the denoising loop, too.
        denoise: False compares the two as they are.
    """

    num_steps: int = 5
    start_timestep: int = 500
    detach_denoiser: bool = False
    temperature: float = 1.0
    warmup: float = 0.0
    fade: bool = False
    standardize: bool = False
    first_gamma: float | None = None
    latent_limit: int | None = None
    time_code: bool = True
    denoise: bool = True

    def narrowed(self, channels: int, classes: int | None = None) -> int | None:
        """Width of the autoencoder for maps of so many channels; None for no autoencoder.

        A space narrower than there are classes could not tell them apart.
        """
        if self.latent_limit is None:
            return None
        limit = max(self.latent_limit, classes or 0)
        return limit if channels > limit else None


_PAPER = Settings()
_ROBUST = Settings(
    num_steps=2,
    standardize=True,
    first_gamma=0.98,
    fade=True,
    latent_limit=32,
    # One timestep for all samples is one vector, which the BatchNorm behind it takes away again.
    time_code=False,
)
PRESETS: dict[str, dict[str, Settings]] = {
    "paper": dict.fromkeys(DISTANCES, _PAPER),
    # Through a denoiser that learns along, class scores teach too little, or nothing.
    "robust": {"mse": _ROBUST, "kl": Settings(denoise=False)},
}


def settings(preset: str, distance: str, per_position: bool = False, **chosen: Any) -> Settings:
    """A preset's settings with those that the user named; None leaves one to the preset.

    What is compared as it is, not denoised, has the usual temperature of class scores, by whether every
    position has its own (`per_position`).

    Raises:
        UserError: a name is unknown or a value impossible.

    >>> settings("robust", "mse", num_steps=5, temperature=None).num_steps
    5
    """
    for what, name, known in (("preset", preset, PRESETS), ("distance", distance, DISTANCES)):
        if name not in known:
            raise UserError(f"unknown {what} '{name}'{nearest(name, tuple(known))}")
    named = {key: value for key, value in chosen.items() if value is not None}
    found = replace(PRESETS[preset][distance], **named)
    if not found.denoise:  # plain distillation: no way that would have to learn first
        temperature = named.get("temperature", usual_temperature(per_position))
        found = replace(found, temperature=temperature, warmup=0.0, fade=False)
    if found.temperature <= 0:
        raise UserError(f"temperature={found.temperature}: needs more than 0")
    if found.num_steps < 1:
        raise UserError(f"num_steps={found.num_steps}: needs at least 1")
    if not 0 <= found.warmup < 1:
        raise UserError(f"warmup={found.warmup}: a share of the run, at least 0 and less than 1")
    return found


def check_sizes(student: int, teacher: int, latent: int | None, dims: int) -> None:
    """Raises UserError where channels or the number of spatial axes are impossible."""
    for name, value in {"student": student, "teacher": teacher, "latent": latent}.items():
        if value is not None and value < 1:
            raise UserError(f"{name}_channels={value}: needs at least 1")
    if dims not in range(4):
        raise UserError(f"spatial_dims={dims}: 0 (vectors), 1 (sequences), 2 (maps) or 3 (volumes)")
    if dims == 0 and latent is not None:
        raise UserError(f"latent_channels={latent}: vectors (spatial_dims=0) have no autoencoder")


def check_shape(side: str, feature: Tensor, channels: int, dims: int) -> None:
    """Raises UserError unless a feature is `(B, channels, *S)` with so many spatial axes."""
    if feature.dim() != dims + 2 or feature.shape[1] != channels:
        axes = ", ".join(["B", str(channels), *("D", "H", "W")[3 - dims :]])
        raise UserError(f"the {side}'s feature is {tuple(feature.shape)}; DiffKD was made for ({axes})")


def check_process(chosen: Settings, timesteps: int, latent: int | None) -> None:
    """Raises UserError where the steps do not fit the schedule, or there is nothing to denoise."""
    if latent is not None and not chosen.denoise:
        raise UserError(f"latent_channels={latent}: nothing is denoised here; preset='paper' denoises scores")
    steps, start = chosen.num_steps, chosen.start_timestep
    if not steps <= start <= timesteps:
        raise UserError(f"start_timestep={start}: between num_steps={steps} and train_timesteps={timesteps}")
