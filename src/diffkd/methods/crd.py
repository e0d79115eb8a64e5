"""CRD: Contrastive Representation Distillation (Tian et al., ICLR 2020, arXiv 1910.10699)."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.maps import vectors
from diffkd.maths.layers import inner_products, unit
from diffkd.maths.losses import check_positive, masked_mean, precise
from diffkd.methods.base import Method, Pair, Range, Setup, module_key, needed_features


class CRD(Method):
    """The student's vector of a sample tells the teacher's of the same sample from those of others.

    Tian et al., ICLR 2020, arXiv 1910.10699. Features, averaged over the positions, pass a linear layer
    and are brought to length 1. Each model's vectors of the whole data set are remembered, and those
    of K other samples are what a vector is contrasted with. With u a vector, w the other model's
    remembered one, N samples in the data set, tau the temperature, and Z fixed by the first batch so
    that exp(u w / tau) / Z is 1 / N in the mean, the posterior that a pair belongs together is

        h(u, w) = p / (p + K / N), p = exp(u w / tau) / Z,

    and the loss is the mean over the batch of -log h of the pair minus the sum of log(1 - h) of the K
    others, of student's vectors with teacher's memory plus the reverse.

    The other samples are drawn evenly from the whole data set; the published runs on CIFAR-100 draw
    them from other classes. Those have the defaults here, and the weight 0.8. The memories take
    8 * N * width bytes (1.3 GB for ImageNet), in every checkpoint too, and each step a copy of them. Among
    several processes DDP hands on the first one's, which sees only its share of the samples: best trained on
    one device.

    Use it for classification on one device, where vectors of all training samples fit into memory.

    Args:
        setup: what the run taps; it needs the data set's size, for the memories.
        width: of the vectors.
        negatives: K; N where that is smaller.
        temperature: tau.
        momentum: share of the old vector in what is remembered of a sample, from 0 to below 1.

    Raises:
        UserError: no feature is tapped, the two of a pair are of different kinds, the data set's size
            is unknown, an option is impossible, or (in the forward pass) the batch has no indices.

    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"0": "0"}, "crd", torch.rand(2, 3, 8, 8), dataset_size=10)
    >>> batch = Batch(torch.rand(2, 3, 8, 8), indices=torch.tensor([3, 9]))
    >>> sorted(distiller(batch))
    ['crd.0.kd']
    """

    stages, uses_logits = "last", False
    weight = 0.8
    search = (Range("temperature", 0.03, 0.3),)

    def __init__(
        self,
        setup: Setup,
        *,
        width: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        check_positive(width=width, negatives=negatives, temperature=temperature)
        if not 0 <= momentum < 1:
            raise UserError(f"momentum={momentum}: from 0 to below 1")
        if setup.dataset_size is None:
            raise UserError(
                "method 'crd' remembers a vector of every training sample; give dataset_size, their number "
                "(samples of a stream have no place to remember)"
            )
        self.pairs = needed_features(setup, "crd", resizes=False)
        self.negatives = min(negatives, setup.dataset_size)
        self.contrasts = nn.ModuleDict(
            {
                module_key(pair.name): Contrast(pair, setup.dataset_size, width, temperature, momentum)
                for pair in self.pairs
            }
        )

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The contrast, by pair."""
        if batch.indices is None:
            raise UserError(
                "method 'crd' must know which samples a batch holds; "
                "give diffkd.Batch(images, targets, indices)"
            )
        losses: dict[str, Tensor] = {}
        for pair in self.pairs:
            features = vectors(student[pair.name], teacher[pair.name].detach(), batch.valid)
            contrast = self.contrasts[module_key(pair.name)]
            losses[f"{pair.name}.kd"] = contrast(*features, batch.indices, self.negatives)
        return losses


class Contrast(nn.Module):
    """Vectors of both models, what is remembered of them, and their contrast.

    Args:
        pair: whose features these are.
        size: number of samples to remember.
        width: of the vectors.
        temperature, momentum: as in `CRD`.
    """

    def __init__(self, pair: Pair, size: int, width: int, temperature: float, momentum: float) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        self.embed_student = nn.Linear(pair.student.channels, width)
        self.embed_teacher = nn.Linear(pair.teacher.channels, width)
        self.student, self.teacher = Memory(size, width), Memory(size, width)

    def forward(
        self, student: Tensor, teacher: Tensor, known: Tensor | None, indices: Tensor, negatives: int
    ) -> Tensor:
        """Student's vectors with teacher's memory, plus the reverse.

        Args:
            student: the student's means over the positions, `(B, C)`.
            teacher: the teacher's.
            known: which samples count, `(B,)`; None for all.
            indices: of the samples in their data set, `(B,)`.
            negatives: how many others each is contrasted with.
        """
        ours = unit(precise(self.embed_student(student)))
        theirs = unit(precise(self.embed_teacher(teacher)))
        size = len(self.student.vectors)
        drawn = torch.randint(size, (len(indices), negatives), device=indices.device)
        chosen = torch.cat([indices.unsqueeze(1), drawn], 1)
        loss: Tensor = self.teacher(ours, chosen, self.temperature, known)
        loss = loss + self.student(theirs, chosen, self.temperature, known)
        if self.training:
            self.student.remember(ours, indices, self.momentum, known)
            self.teacher.remember(theirs, indices, self.momentum, known)
        return loss


class Memory(nn.Module):
    """One model's vectors of all samples, `(N, width)`.

    Args:
        size: N.
        width: of the vectors.
    """

    vectors: Tensor
    log_z: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        # Evenly random, and of length 1 in the mean.
        bound = math.sqrt(3 / width)
        self.register_buffer("vectors", torch.empty(size, width).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.tensor(math.inf))

    def forward(self, vectors: Tensor, chosen: Tensor, temperature: float, known: Tensor | None) -> Tensor:
        """Noise-contrastive estimation.

        Args:
            vectors: the other model's, `(B, width)`.
            chosen: positions in the memory `(B, 1 + K)`: a vector's own sample, then the others.
            temperature: which the inner products are divided by.
            known: which vectors count, `(B,)`; None for all.
        """
        # All products cost less than the K memorised vectors of each sample side by side would.
        # The copy is for the backward pass, before which the memory changes in place.
        scores = inner_products(vectors, precise(self.vectors.clone())) / temperature
        scores = scores.gather(1, chosen)
        noise = math.log((chosen.shape[1] - 1) / len(self.vectors))
        logits = scores - self._normalizer(scores) - noise
        return masked_mean(F.softplus(-logits[:, 0]) + F.softplus(logits[:, 1:]).sum(1), known)

    @torch.no_grad()
    def _normalizer(self, scores: Tensor) -> Tensor:
        """Log Z: set by the first scores in training, then kept."""
        first = scores.flatten().logsumexp(0) - math.log(scores.numel()) + math.log(len(self.vectors))
        log_z = torch.where(self.log_z.isinf(), first, precise(self.log_z))
        if self.training:
            self.log_z.copy_(log_z)
        return log_z

    @torch.no_grad()
    def remember(self, vectors: Tensor, indices: Tensor, momentum: float, known: Tensor | None) -> None:
        """Moves what is remembered of known samples, `(B,)` positions, towards their vectors `(B, width)`."""
        old = precise(self.vectors[indices])
        moved = unit(momentum * old + (1 - momentum) * vectors)
        if known is not None:
            moved = torch.where(known.unsqueeze(1), moved, old)
        self.vectors.index_copy_(0, indices, moved.to(self.vectors.dtype))
