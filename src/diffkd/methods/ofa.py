"""OFA: One-for-All, Bridge the Gap Between Heterogeneous Architectures (NeurIPS 2023, arXiv 2310.19444)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.features.maps import valid_at
from diffkd.maths.layers import conv, norm, pooled, without_void
from diffkd.maths.losses import check_positive, hard_targets, masked_mean, precise
from diffkd.methods.base import Method, Range, Setup, module_key, needed_logits


class OFA(Method):
    """Each of the student's features, turned into class scores by a head, is matched with the teacher's.

    Hao et al., NeurIPS 2023, arXiv 2310.19444; for teachers and students of different kinds, as the
    teacher's features are not looked at. With p the teacher's probabilities, q those of a head, and y
    the one-hot label, the loss is the mean over samples of

        kd = - sum over classes of ((p + y)^eps - y) log q,

    in which an eps above 1 gives the target class more weight the surer the teacher is of it; 1 is
    cross-entropy with p. The student's own scores have the same loss, with an eps of their own or not. Labels
    are taken as in DKD: of class probabilities the largest, the teacher's where there are none.

    For CIFAR-100 both eps are 1, the temperature 1, and all weights 1; for ImageNet with ResNet-18 and
    DeiT-T both eps are 1.5. The published heads shrink earlier stages by more layers; here each head
    is one depthwise-separable 3x3 convolution, global mean and a linear layer (for vectors, the last).

    Use it where teacher and student are of different kinds (a transformer and a convolutional
    network), whose features can hardly be compared.

    Args:
        setup: what the run taps.
        eps: exponent of the target's part, for the heads.
        logits_eps: the same for the student's own scores; None takes `eps`.
        temperature: what the scores are divided by.

    Raises:
        UserError: no feature or no class scores are tapped, these have spatial axes, or an option is
            impossible.

    >>> from diffkd import Distiller
    >>> def net(c):
    ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.Flatten(), nn.Linear(36 * c, 5))
    >>> distiller = Distiller(net(4), net(8), {"0": "0", "": ""}, "ofa", torch.rand(2, 3, 8, 8))
    >>> sorted(distiller((torch.rand(2, 3, 8, 8), torch.tensor([0, 4]))))
    ['ofa.0.kd', 'ofa.output.kd']
    """

    stages = "all"
    search = (Range("eps", 1.0, 2.0),)

    def __init__(
        self, setup: Setup, *, eps: float = 1.0, logits_eps: float | None = None, temperature: float = 1.0
    ) -> None:
        super().__init__()
        logits_eps = eps if logits_eps is None else logits_eps
        check_positive(eps=eps, logits_eps=logits_eps, temperature=temperature)
        self.eps, self.logits_eps, self.temperature = eps, logits_eps, temperature
        self.output, *more = needed_logits(setup, "ofa")
        shape = self.output.teacher.shape
        if more or len(shape) > 1 or self.output.student.spatial_dims:
            raise UserError(
                f"method 'ofa' needs class scores (K,) of one output; the teacher's '{self.output.name}' is "
                f"{shape}, of {1 + len(more)}; use 'kd', 'dkd' or 'dist'"
            )
        if not setup.features:
            raise UserError("method 'ofa' needs a feature to distil; set taps")
        width = max(f.channels for pair in setup.features for f in (pair.student, pair.teacher))
        self.keys = {pair.name: module_key(pair.name) for pair in setup.features}
        self.heads = nn.ModuleDict()
        for pair in setup.features:
            feature = pair.student
            head = Head(feature.spatial_dims, feature.channels, width, shape[0])
            self.heads[self.keys[pair.name]] = head

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The loss of each head, and of the student's own scores."""
        name = self.output.name
        theirs = precise(teacher[name])
        labels, known = hard_targets(batch.targets, theirs)
        onehot = torch.zeros_like(theirs).scatter(1, labels.unsqueeze(1), 1.0)
        probs = (theirs / self.temperature).softmax(1)

        def loss(logits: Tensor, eps: float, known: Tensor) -> Tensor:
            log_probs = F.log_softmax(precise(logits) / self.temperature, dim=1)
            enhanced = (probs + onehot).pow(eps) - onehot
            return masked_mean(-(enhanced * log_probs).sum(1), known)

        losses: dict[str, Tensor] = {}
        for tap, key in self.keys.items():
            valid = valid_at(batch.valid, student[tap])
            counted = known if valid is None else known & valid.flatten(1).any(1)
            losses[f"{tap}.kd"] = loss(self.heads[key](student[tap], valid), self.eps, counted)
        return losses | {f"{name}.kd": loss(student[name], self.logits_eps, known)}


class Head(nn.Module):
    """Class scores of a feature: `(B, channels, *S)` to `(B, classes)`.

    Args:
        dims: number of spatial axes; with none, this is a linear layer.
        channels: of the feature.
        width: channels after the convolution.
        classes: how many scores.
    """

    def __init__(self, dims: int, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.body: nn.Module = nn.Identity()
        if dims:
            kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
            depthwise = kind(channels, channels, 3, padding=1, groups=channels, bias=False)
            self.body = nn.Sequential(depthwise, conv(dims, channels, width), norm(dims, width), nn.ReLU())
        self.classifier = nn.Linear(width if dims else channels, classes)

    def forward(self, feature: Tensor, valid: Tensor | None = None) -> Tensor:
        """The scores, of the valid positions `(B, *S)`; None for all."""
        feature = self.body(without_void(feature.to(self.classifier.weight.dtype), valid))
        scores: Tensor = self.classifier(pooled(feature, valid))
        return scores
