"""DiffKD: Knowledge Diffusion for Distillation (Huang et al., NeurIPS 2023, arXiv 2305.15712)."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.levels import check_weights, pooled
from diffkd.features.maps import matched, valid_at
from diffkd.maths.denoiser import (
    Autoencoder,
    Denoiser,
    DiffKDOutput,
    NoiseMatcher,
    Standardizer,
    with_fixed_weights,
)
from diffkd.maths.diffusion import add_noise, alpha_bars, ddim_step, ddim_timesteps, noise_like
from diffkd.maths.layers import conv, norm, recomputed, without_void
from diffkd.maths.losses import kl_divergence, precise, squared_error
from diffkd.maths.presets import PresetName, check_process, check_shape, check_sizes, settings
from diffkd.maths.progress import Gate
from diffkd.methods.base import Choice, Method, Range, Setup, check_pair, module_key, resizing, shared_key


class DiffKD(nn.Module):
    """Denoises the student's feature with a diffusion model of the teacher's, then matches them.

    Args:
        student_channels: channels of the student's feature.
        teacher_channels: channels of the teacher's feature.
        preset: what the other settings are where they are None. "paper" is the published method.
            "robust" departs from it where small students, short runs and features of any scale
            suffered: the teacher's feature is standardized, most of the student's feature is kept at the
            start, the end of the run belongs to the labels (`fade`), maps wider than 32 channels are
            compared in 32, with 2 steps; class scores ("kl") are compared as they are, which is plain KD
            (temperature 4, or 1 per position).
        latent_channels: width of the space that both are compared in; an autoencoder brings the
            teacher's feature there. None: the teacher's own space, or the preset's. Not for vectors.
        spatial_dims: 0 for vectors and logits `(B, C)`, 1 for sequences `(B, C, L)`, 2 for maps
            `(B, C, H, W)`, 3 for volumes `(B, C, D, H, W)`.
        num_steps: evaluations of the denoiser per forward pass.
        train_timesteps: length of the noise schedule.
        start_timestep: how noisy the student's feature is taken to be.
        distance: "mse", or "kl" for class scores: Kullback-Leibler divergence over the channel
            axis, mean over samples and positions, times `temperature` squared.
        detach_denoiser: the distance's gradient stops at the denoiser's weights (it still passes
            through the denoiser to the student). The paper's code lets it in.
        temperature: of "kl".
        warmup: share of the run, counted in forward passes in training mode, in which no gradient
            reaches the student while all on its way learns. The run's length comes by `expect`.
        fade: after the warm-up, what reaches the student of the distance's gradient falls evenly to nothing.

    Raises:
        UserError: an argument is impossible, or a feature does not have the shape promised here.

    >>> diffkd = DiffKD(8, 16, latent_channels=4)
    >>> out = diffkd(torch.rand(2, 8, 5, 5), torch.rand(2, 16, 5, 5))
    >>> out.denoised.shape, out.gamma.shape
    (torch.Size([2, 4, 5, 5]), torch.Size([2]))
    """

    alpha_bars: Tensor

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        preset: PresetName = "robust",
        latent_channels: int | None = None,
        spatial_dims: int = 2,
        num_steps: int | None = None,
        train_timesteps: int = 1000,
        start_timestep: int | None = None,
        distance: str = "mse",
        detach_denoiser: bool | None = None,
        temperature: float | None = None,
        warmup: float | None = None,
        fade: bool | None = None,
    ) -> None:
        super().__init__()
        check_sizes(student_channels, teacher_channels, latent_channels, spatial_dims)
        chosen = {"num_steps": num_steps, "start_timestep": start_timestep, "temperature": temperature}
        chosen |= {"detach_denoiser": detach_denoiser, "warmup": warmup, "fade": fade}
        self.settings = settings(preset, distance, per_position=spatial_dims > 0, **chosen)
        check_process(self.settings, train_timesteps, latent_channels)
        if latent_channels is None and spatial_dims:
            latent_channels = self.settings.narrowed(teacher_channels)
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.channels, self.spatial_dims = latent_channels or teacher_channels, spatial_dims
        self.train_timesteps, self.distance = train_timesteps, distance
        self.autoencoder = None
        if latent_channels is not None:
            self.autoencoder = Autoencoder(spatial_dims, teacher_channels, latent_channels)
        self._build()
        self._schedule()
        steps = ddim_timesteps(self.settings.num_steps, self.settings.start_timestep)
        alphas = [*alpha_bars(train_timesteps)[steps].tolist(), 1.0]
        self.ddim = list(zip(steps, alphas[:-1], alphas[1:], strict=True))
        self._told = self.recompute = False

    def _build(self) -> None:
        """What is trained, but for the autoencoder, and what is counted."""
        chosen, dims, width = self.settings, self.spatial_dims, self.channels
        same = not chosen.denoise and self.student_channels == width
        self.align = nn.Identity() if same else conv(dims, self.student_channels, width)
        self.gate: Gate | None = None
        if not chosen.denoise:
            return
        self.denoiser = Denoiser(dims, width, self.train_timesteps)
        self.noise_matcher = NoiseMatcher(dims, width, chosen.first_gamma)
        self.projection = nn.Sequential(conv(dims, width, width), norm(dims, width))
        self.standardizer = Standardizer(self.teacher_channels) if chosen.standardize else None
        if chosen.warmup or chosen.fade:
            self.gate = Gate(chosen.warmup, chosen.fade)

    def expect(self, passes: int) -> None:
        """Says how many forward passes in training mode the run will have, for warm-up and fading.

        Where nobody says, the warm-up is 300 passes long and nothing fades.
        """
        if self.gate is not None:
            self.gate.expect(passes)

    __call__: Callable[..., DiffKDOutput]  # so that editors complete `.loss`

    def forward(
        self, student_feature: Tensor, teacher_feature: Tensor, valid: Tensor | None = None
    ) -> DiffKDOutput:
        """All losses of one training step.

        Args:
            student_feature: `(B, student_channels, *S)`.
            teacher_feature: `(B, teacher_channels, *S)`; where sizes differ, the larger is resized.
            valid: `(B, *S)` bool of any size, False where there is nothing to learn (padding, void
                pixels): what stands there changes no loss and gets no gradient. None for all valid.
        """
        check_shape("student", student_feature, self.student_channels, self.spatial_dims)
        check_shape("teacher", teacher_feature, self.teacher_channels, self.spatial_dims)
        self._tell_sizes(student_feature, teacher_feature)
        student_feature, teacher_feature, valid = matched(student_feature, teacher_feature, valid)
        if not self.settings.denoise:
            return self._compare(student_feature, teacher_feature, valid)
        target, reconstruction_loss = self._encode(teacher_feature, valid)
        reached = student_feature if self.gate is None else self.gate(student_feature)
        denoised, gamma = self._denoise(self.align(reached), valid=valid)
        kd_loss = self._distance(denoised, target, valid)
        diffusion_loss = self.diffusion_loss(target, valid=valid)
        loss = kd_loss + diffusion_loss + reconstruction_loss
        return DiffKDOutput(denoised, target, loss, kd_loss, diffusion_loss, reconstruction_loss, gamma)

    def denoise(self, feature: Tensor, noise: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """The student's feature, denoised: what is matched with the target.

        Args:
            feature: `(B, student_channels, *S)`.
            noise: `(B, C, *S)`, of the latent's shape; None draws it.
            valid: as in `forward`.
        """
        check_shape("student", feature, self.student_channels, self.spatial_dims)
        valid = valid_at(valid, feature)
        latent = self.align(without_void(feature, valid))
        return self._denoise(latent, noise, valid)[0] if self.settings.denoise else latent

    def steps(self, student_feature: Tensor, teacher_feature: Tensor) -> dict[str, Tensor]:
        """What the student's feature is on its way, and the target, each `(B, C, *S)`, to be looked at.

        Keys: "student" in the common space, "with noise", "step 1" and so on, "denoised", "teacher"; and
        "gamma" `(B,)`. Where nothing is denoised, "student" and "teacher" alone.
        """
        ours, theirs, _ = matched(student_feature, teacher_feature, None)
        if not self.settings.denoise:
            return {"student": self.align(ours), "teacher": theirs}
        target, _ = self._encode(theirs, None)
        latent, kept = self.align(ours), list[Tensor]()
        denoised, gamma = self._denoise(latent, kept=kept)
        way = {"with noise" if i == 0 else f"step {i}": feature for i, feature in enumerate(kept)}
        return {"student": latent, **way, "denoised": denoised, "teacher": target, "gamma": gamma}

    def diffusion_loss(
        self,
        target: Tensor,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the noise that the denoiser sees in noisy teacher features.

        Args:
            target: `(B, C, *S)`, the clean latent.
            noise: of the target's shape; None draws it.
            timesteps: `(B,)` int64 below `train_timesteps`; None draws them.
            valid: as in `forward`.
        """
        valid = valid_at(valid, target)
        if noise is None:
            noise = noise_like(target)
        if timesteps is None:
            timesteps = torch.randint(0, self.train_timesteps, (len(target),), device=target.device)
        noisy = add_noise(precise(target), precise(noise), self.alpha_bars[timesteps])
        noisy = without_void(noisy, valid)
        predicted = self.denoiser(noisy.to(target.dtype), self.denoiser.embedding(timesteps))
        return squared_error(precise(predicted), precise(noise), valid)

    def _compare(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> DiffKDOutput:
        """What is left where nothing is denoised: the distance."""
        ours, theirs = self.align(student), teacher.detach()
        loss = self._distance(ours, theirs, valid)
        return DiffKDOutput(
            ours, theirs, loss, loss, loss.new_zeros(()), loss.new_zeros(()), loss.new_ones(len(ours))
        )

    def _encode(self, teacher_feature: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """The target, and how badly the autoencoder rebuilds the teacher's feature."""
        teacher_feature = teacher_feature.detach()
        if self.standardizer is not None:
            teacher_feature = self.standardizer(teacher_feature, valid)
        if self.autoencoder is None:
            return teacher_feature, teacher_feature.new_zeros((), dtype=self.alpha_bars.dtype)
        latent = self.autoencoder.encoder(teacher_feature)
        rebuilt = self.autoencoder.decoder(latent)
        loss = squared_error(precise(rebuilt), precise(teacher_feature), valid)
        return without_void(latent.detach(), valid), loss

    def _denoise(
        self,
        latent: Tensor,
        noise: Tensor | None = None,
        valid: Tensor | None = None,
        kept: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Noise matching, the DDIM steps, the projection; also gamma `(B,)`. `kept` gets what is between."""
        noise = noise_like(latent) if noise is None else noise
        gamma = self.noise_matcher(without_void(latent, valid), valid)
        share = gamma.view(-1, *[1] * (latent.dim() - 1))
        noisy = without_void(share * latent + (1 - share) * noise, valid)
        detached, codes = self.settings.detach_denoiser, self.denoiser.embedding.weight
        denoiser = with_fixed_weights(self.denoiser) if detached else self.denoiser
        if self.recompute:
            denoiser = recomputed(denoiser, within=self.denoiser)
        for timestep, alpha_bar, alpha_bar_next in self.ddim:
            if kept is not None:
                kept.append(noisy)
            code = codes[timestep] if self.settings.time_code else None
            predicted = denoiser(noisy, code)
            noisy = without_void(ddim_step(noisy, predicted, alpha_bar, alpha_bar_next), valid)
        if kept is not None:
            kept.append(noisy)
        return self.projection(noisy), precise(gamma)

    def _distance(self, denoised: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
        denoised, target = precise(denoised), precise(target)
        if self.distance == "mse":
            return squared_error(denoised, target, valid)
        return kl_divergence(denoised, target, self.settings.temperature, valid)

    def _tell_sizes(self, student: Tensor, teacher: Tensor) -> None:
        """Says once that there is something to resize."""
        ours, theirs = tuple(student.shape[2:]), tuple(teacher.shape[2:])
        if ours != theirs and not self._told and not torch.compiler.is_compiling():
            self._told = True
            warnings.warn(resizing(ours, theirs), stacklevel=3)

    def _schedule(self) -> None:
        """Puts the schedule where the weights are."""
        if not self.settings.denoise:
            return
        weight = self.denoiser.embedding.weight
        # Half precision cannot tell the schedule's ends apart: it stays in float32 at least.
        precise = torch.float64 if weight.dtype == torch.float64 else torch.float32
        schedule = alpha_bars(self.train_timesteps).to(precise).to(weight.device)
        self.register_buffer("alpha_bars", schedule, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DiffKD":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._schedule()
        return self


class DiffKDMethod(Method):
    """DiffKD on every tapped pair: features by mean squared error, class scores by KL divergence.

    Huang et al., NeurIPS 2023, arXiv 2305.15712. With F the student's feature, Z the teacher's as its
    autoencoder encodes it (or as it is), eps noise, and e the denoiser, the losses are

        diffusion = mean((eps - e(sqrt(a_t) Z + sqrt(1 - a_t) eps, t))^2), t drawn for each sample
        kd = d(denoised(gamma F + (1 - gamma) eps), Z), d mse or KL, denoised by a few DDIM steps with e
        reconstruction = mean((decoded(Z) - teacher)^2),

    gamma learnt for each sample. What the default preset does otherwise is said in `DiffKD`.

    Use it where the student is much smaller than the teacher: its features look noisy. It costs time.

    Args:
        setup: what the run taps.
        latent_channels: width of the autoencoder's space for features (ImageNet: 1024); None has none,
            or the preset's (32, or the number of classes if larger).
        pool: maps are averaged over so many positions along each axis first, for large ones.
        shared: one module serves all features of the same widths (the levels of a pyramid).
        weights: of the distance of single pairs, by name (`{"backbone[p3]": 0.5}`); 1 if not given.
        preset, num_steps, train_timesteps, start_timestep, detach_denoiser, temperature, warmup, fade: as in
            `DiffKD`.
        recompute: denoising steps are run again in the backward pass, not kept: less memory, more time.

    Raises:
        UserError: nothing is tapped, or `pool` is less than 1.
    """

    search = (Choice("preset", ("robust", "paper")), Range("temperature", 1.0, 10.0))

    @classmethod
    def leaves_scores(cls, options: Mapping[str, Any]) -> bool:
        """Where they would be compared as they are: once is enough."""
        return not settings(options.get("preset", "robust"), "kl").denoise

    def __init__(
        self,
        setup: Setup,
        *,
        preset: PresetName = "robust",
        num_steps: int | None = None,
        latent_channels: int | None = None,
        train_timesteps: int = 1000,
        start_timestep: int | None = None,
        detach_denoiser: bool | None = None,
        temperature: float | None = None,
        warmup: float | None = None,
        fade: bool | None = None,
        pool: int = 1,
        recompute: bool = False,
        shared: bool = False,
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        if not setup.pairs:
            raise UserError("method 'diffkd' needs a feature map or logits to distil; set taps")
        if pool < 1:
            raise UserError(f"method 'diffkd': pool={pool}: needs at least 1")
        self.pool, self.weights = pool, check_weights(weights or {}, setup.pairs, "diffkd")
        self.pairs = nn.ModuleDict()
        self.keys = {p.name: shared_key(p) if shared else module_key(p.name) for p in setup.pairs}
        usual = settings(preset, "mse")
        chosen: dict[str, Any] = {"num_steps": num_steps, "start_timestep": start_timestep, "fade": fade}
        chosen |= {"detach_denoiser": detach_denoiser, "temperature": temperature, "warmup": warmup}
        for pair in setup.pairs:
            check_pair(pair, "diffkd")
            if self.keys[pair.name] in self.pairs:
                continue
            latent = latent_channels or usual.narrowed(pair.teacher.channels, setup.num_classes)
            plain = pair.is_logits or pair.student.spatial_dims == 0
            diffkd = DiffKD(
                pair.student.channels,
                pair.teacher.channels,
                latent_channels=None if plain else latent,
                spatial_dims=pair.student.spatial_dims,
                distance="kl" if pair.is_logits else "mse",
                preset=preset,
                train_timesteps=train_timesteps,
                **chosen,
            )
            diffkd._told, diffkd.recompute = True, recompute  # check_pair told of unequal sizes
            self.pairs[self.keys[pair.name]] = diffkd
        of = {name: cast(DiffKD, self.pairs[key]).settings for name, key in self.keys.items()}
        self.figures = {f"{name}.gamma": torch.zeros(()) for name in of if of[name].denoise}

    def expect(self, passes: int) -> None:
        """Tells every pair how long the run is."""
        uses = Counter(self.keys.values())  # a shared module passes once a level
        for key, diffkd in self.pairs.items():
            diffkd.expect(passes * uses[key])  # type: ignore[operator]

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Distance, diffusion and reconstruction losses of every pair."""
        losses: dict[str, Tensor] = {}
        for name, key in self.keys.items():
            diffkd = cast(DiffKD, self.pairs[key])
            ours, theirs = (pooled(x[name], batch.valid, self.pool) for x in (student, teacher))
            out: DiffKDOutput = diffkd(ours, theirs, batch.valid)
            losses[f"{name}.kd"] = out.kd_loss * self.weights.get(name, 1.0)
            if diffkd.settings.denoise:
                losses[f"{name}.diffusion"] = out.diffusion_loss
                self.figures[f"{name}.gamma"] = out.gamma.detach().mean()
            if diffkd.autoencoder is not None:
                losses[f"{name}.reconstruction"] = out.reconstruction_loss
        return losses

    def matched(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The denoised feature and its target, of every pair."""
        outs = {name: self.pairs[key](student[name], teacher[name]) for name, key in self.keys.items()}
        return {name: (out.denoised, out.target) for name, out in outs.items()}
