"""Image classification: one class per picture, or any number of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.batch import UNLABELLED, Batch
from diffkd.data.base import Data, Split
from diffkd.errors import UserError
from diffkd.features.outputs import class_scores
from diffkd.tasks.base import Task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

_LEFT_OUT = -100  # of the loss: PyTorch's own number for it
_COUNT = "mend it, or set the data's num_classes"
_NEAR = 1e-2  # probabilities in half precision sum to 1 as nearly


class Labels(ABC):
    """What the targets of pictures are: how they are learned, checked and counted.

    Args:
        count: K, the number of classes.
        smoothing: share of the target probability spread evenly over all that a target may be.
        weights: of each class in the loss; empty for 1 each.
        partly: targets may be `UNLABELLED`, which the loss leaves out.
    """

    figure: str  # of merit, among those that `metrics` computes
    figure_label: str
    loss_name: str
    wanted: str  # what targets must be

    def __init__(
        self, count: int, smoothing: float, weights: tuple[float, ...], partly: bool = False
    ) -> None:
        self.count, self.smoothing, self.partly = count, smoothing, partly
        self._weights = torch.tensor(weights) if weights else None

    def weights(self, device: torch.device) -> Tensor | None:
        """Of each class in the loss `(K,)`, on a device; None for 1 each."""
        if self._weights is not None:
            self._weights = self._weights.to(device)
        return self._weights

    def loss(self, scores: Tensor, targets: Tensor, known: Tensor) -> Tensor:
        """Of scores `(B, K)` and usable targets, a scalar; 0 where none is known `(B,)`."""
        if not self.partly:
            return self.mean(scores, targets)
        each, counts = self.each(scores, targets)
        return each.masked_fill(~known, 0).sum() / counts.masked_fill(~known, 0).sum().clamp(min=1e-6)

    @abstractmethod
    def mean(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Loss of scores `(B, K)` and usable targets, a scalar."""

    @abstractmethod
    def each(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each picture `(B,)`, and how much each counts in their mean."""

    @abstractmethod
    def usable(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Targets that the loss takes, which of them are wrong `(B,)`, and an example of each `(B,)`."""

    @abstractmethod
    def misfit(self, targets: Any) -> str | None:
        """What targets are that cannot be used, and the way out; None where they can be."""

    @abstractmethod
    def metrics(self) -> "MetricCollection":
        """Fresh metrics over a whole data set."""

    @abstractmethod
    def update(self, metrics: "MetricCollection", scores: Tensor, targets: Tensor) -> None:
        """Counts one batch in."""

    @abstractmethod
    def answers(self, scores: Tensor) -> Tensor:
        """What scores say the targets are."""


class OneClass(Labels):
    """One class per picture: cross-entropy, top-1, top-5."""

    figure, figure_label, loss_name = "top1", "top-1", "cross_entropy"

    @property
    def wanted(self) -> str:  # type: ignore[override]
        """Class indices."""
        return f"classification needs class indices (B,), integers of 0 to {self.count - 1}"

    def mean(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy."""
        return self._cross_entropy(scores, targets, "mean")

    def each(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy; a class index counts as its class weighs, as in PyTorch's own mean."""
        each = self._cross_entropy(scores, targets, "none")
        weights = self.weights(scores.device)
        if weights is None or targets.dim() == 2:
            return each, torch.ones_like(each)
        return each, weights[targets.clamp(min=0)]

    def _cross_entropy(self, scores: Tensor, targets: Tensor, reduction: str) -> Tensor:
        weights = self.weights(scores.device)
        return F.cross_entropy(
            scores.float(), targets, weights, reduction=reduction, label_smoothing=self.smoothing
        )

    def usable(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class indices `(B,)`, those out of range left out; or probabilities `(B, K)`."""
        if targets.dim() == 1:
            values = targets.long()
            out = (values < 0) | (values >= self.count)
            wrong = out & (values != _LEFT_OUT)
            return values.masked_fill(out, _LEFT_OUT), wrong, values
        found = targets.float()
        sums = found.sum(1)
        return found, ~(((sums - 1).abs() < _NEAR) & (found >= 0).all(1)), sums

    def misfit(self, targets: Any) -> str | None:
        """Whatever is neither class indices nor class probabilities."""
        count = self.count
        if not isinstance(targets, Tensor):
            return f"the targets are a {type(targets).__name__}; {self.wanted}"
        kind, shape = str(targets.dtype).removeprefix("torch."), tuple(targets.shape)
        whole = not targets.is_floating_point() and not targets.is_complex()
        if targets.dim() == 1 and whole:
            bad = targets[((targets < 0) | (targets >= count)) & (targets != _LEFT_OUT)]
            return f"target {bad[0]} is no class of 0 to {count - 1}; {_COUNT}" if len(bad) else None
        if targets.dim() != 2 or targets.shape[1] != count:
            return f"the targets are {kind} {shape}; {self.wanted}"
        sums = targets.double().sum(1)
        binary = bool(((targets == 0) | (targets == 1)).all())
        if binary and bool((sums != 1).any()):
            return (
                f"the targets are multi-hot {shape}, several classes or none for a picture; {self.wanted}; "
                "task.multi_label=true learns several"
            )
        if whole:
            found = "one-hot" if binary else kind
            return (
                f"the targets are {found} {shape}; {self.wanted}: give target.argmax() for each picture, or "
                "set task.multi_label=true where a picture may show several"
            )
        if bool(((sums - 1).abs() > _NEAR).any()) or bool((targets < 0).any()):
            far = sums[(sums - 1).abs().argmax()]
            return (
                f"the targets {shape} are no probabilities: a row sums to {far:.3g}; give class indices, or "
                "target.softmax(0) of scores"
            )
        return None

    def metrics(self) -> "MetricCollection":
        """Top-1, and top-5 where there are more than five classes."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        kinds = {"top1": 1} | ({"top5": 5} if self.count > 5 else {})
        return MetricCollection(
            {name: MulticlassAccuracy(self.count, top_k=k, average="micro") for name, k in kinds.items()},
            compute_groups=False,
        )

    def update(self, metrics: "MetricCollection", scores: Tensor, targets: Tensor) -> None:
        """Of class probabilities the largest is the class."""
        metrics.update(scores, targets.argmax(1) if targets.dim() == 2 else targets)

    def answers(self, scores: Tensor) -> Tensor:
        """The classes with the highest scores, `(B,)`."""
        return scores.argmax(1)


class AnyClasses(Labels):
    """Any number of classes per picture: binary cross-entropy of each, mean average precision."""

    figure, figure_label, loss_name = "map", "mAP", "binary_cross_entropy"

    @property
    def wanted(self) -> str:  # type: ignore[override]
        """Rows of 0 and 1."""
        return f"task.multi_label needs targets (B, {self.count}) of 0 and 1"

    def mean(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Mean over pictures and classes of the binary cross-entropy."""
        return self._cross_entropy(scores, targets, "mean")

    def each(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy, the mean over classes."""
        each = self._cross_entropy(scores, targets, "none").mean(1)
        return each, torch.ones_like(each)

    def _cross_entropy(self, scores: Tensor, targets: Tensor, reduction: str) -> Tensor:
        smoothed = targets * (1 - self.smoothing) + self.smoothing / 2
        weights = self.weights(scores.device)
        return F.binary_cross_entropy_with_logits(scores.float(), smoothed, weights, reduction=reduction)

    def usable(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shares `(B, K)` of 0 to 1, as mixup makes of 0 and 1; rows with others count as none."""
        found = targets.float()
        wrong = ~((found >= 0) & (found <= 1)).all(1)  # nan is neither
        return found.masked_fill(wrong[:, None], 0), wrong, found.nan_to_num(-1).amax(1)

    def misfit(self, targets: Any) -> str | None:
        """Whatever is no row of 0 and 1 for each picture."""
        if not isinstance(targets, Tensor):
            return f"the targets are a {type(targets).__name__}; {self.wanted}"
        kind, shape = str(targets.dtype).removeprefix("torch."), tuple(targets.shape)
        if targets.dim() != 2 or targets.shape[1] != self.count or targets.is_complex():
            return f"the targets are {kind} {shape}; {self.wanted}"
        odd = targets[~((targets >= 0) & (targets <= 1))]
        return f"a target holds {odd[0]:g}; {self.wanted}" if len(odd) else None

    def metrics(self) -> "MetricCollection":
        """Mean average precision over the classes that occur, that of each class, and F1 at one half."""
        from diffkd.maths.labels import label_metrics

        return label_metrics(self.count)

    def update(self, metrics: "MetricCollection", scores: Tensor, targets: Tensor) -> None:
        """A share of one half or more counts as the class."""
        metrics.update(scores.float().sigmoid(), (targets >= 0.5).long())

    def answers(self, scores: Tensor) -> Tensor:
        """Rows `(B, K)` of 0 and 1."""
        return (scores > 0).long()


class Classification(Task):
    """Cross-entropy on logits `(B, K)`; top-1 accuracy, and top-5 where there are more classes.

    Targets are class indices `(B,)` (-100 and `UNLABELLED` are left out of the loss), class probabilities
    `(B, K)` (mixup, cutmix), or None. With `multi_label` they are rows `(B, K)` of 0 and 1, any number of
    classes for a picture: binary cross-entropy, mean average precision (mAP) and F1 at one half.
    Models give logits `(B, K)`, an object or dict with `logits`, or a tuple that begins with them; what
    they give of auxiliary heads in training is a loss of its own, `auxiliary`.

    Args:
        data: the data set; its number of classes must be known.
        multi_label: pictures may show several classes, or none.
        label_smoothing: share of the target probability spread evenly over all classes.
        auxiliary_weight: of each auxiliary head's cross-entropy; None is 0.4 for a single head (Inception
            v3, arXiv 1512.00567), 0.3 for each of several (GoogLeNet, arXiv 1409.4842).

    Raises:
        UserError: the data set has no classes, or an option is out of range.
    """

    metric = "top1"
    metric_label = "top-1"
    weighs_classes = True
    unlabelled = True
    half = True

    def __init__(
        self,
        data: Data,
        *,
        multi_label: bool = False,
        label_smoothing: float = 0.0,
        auxiliary_weight: float | None = None,
    ) -> None:
        super().__init__(data)
        if data.num_classes is None:
            raise UserError("task 'classification' needs a data set with classes")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"task.label_smoothing={label_smoothing}: needs at least 0 and less than 1")
        if auxiliary_weight is not None and auxiliary_weight < 0:
            raise UserError(f"task.auxiliary_weight={auxiliary_weight}: needs at least 0")
        if data.num_classes < 2 and not multi_label:
            raise UserError("the data has 1 class: classification needs 2 at least; name the other one, too")
        self.num_classes, self.independent = data.num_classes, multi_label
        self.labels: Labels = (AnyClasses if multi_label else OneClass)(
            data.num_classes, label_smoothing, data.class_weights, data.unlabelled is not None
        )
        self.metric, self.metric_label = self.labels.figure, self.labels.figure_label
        self.auxiliary_weight = auxiliary_weight
        self._wrong: Tensor | None = None  # targets met so far that are no classes, and one of them

    def loss(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of logits `(B, K)`, and of auxiliary heads; empty without targets."""
        if batch.targets is None:
            return {}
        scores, heads = class_scores(output)
        targets, known = self._usable(batch.targets)
        losses = {self.labels.loss_name: self.labels.loss(scores, targets, known)}
        if heads:
            usual = 0.4 if len(heads) == 1 else 0.3
            weight = usual if self.auxiliary_weight is None else self.auxiliary_weight
            several = torch.stack([self.labels.loss(head, targets, known) for head in heads])
            losses["auxiliary"] = weight * several.sum()
        return losses

    def _usable(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Targets that the loss takes, and which of them say something `(B,)`.

        What is wrong is remembered, and the host does not wait.
        """
        usable, wrong, values = self.labels.usable(targets)
        first = targets if targets.dim() == 1 else targets[:, 0]
        missing = first == UNLABELLED
        wrong = wrong & ~missing
        example = values.detach().float().masked_fill(~wrong, float("-inf")).amax()
        now = torch.stack([wrong.sum().float(), example])
        before = now.new_tensor([0, float("-inf")]) if self._wrong is None else self._wrong
        self._wrong = torch.stack([before[0] + now[0], torch.maximum(before[1], now[1])])
        return usable, ~(missing | (first == _LEFT_OUT))

    def check_seen(self) -> None:
        """Raises UserError where training met targets that are no classes and no probabilities."""
        count, example = (0.0, 0.0) if self._wrong is None else self._wrong.tolist()
        self._wrong = None
        if count:
            known = f"neither classes of 0 to {self.num_classes - 1} nor probabilities that sum to 1"
            known = "not of 0 to 1" if self.independent else known
            raise UserError(
                f"training data: {count:.0f} targets are {known} (found: {example:g}); mend them, or set the "
                "data's num_classes"
            )

    def check_data(self, first: Callable[[Split], Any]) -> None:
        """Raises UserError unless the first targets are class indices or class probabilities."""
        for what, split in (("training", self.data.train), ("test", self.data.test)):
            targets = first(split)
            wrong = None if targets is None else self.labels.misfit(targets)
            if wrong is not None:
                raise UserError(f"{what} data: {wrong}")

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """Logits `(B, K)` of the main head."""
        return class_scores(self.run(model, batch))[0]

    def metrics(self) -> "MetricCollection":
        """Top-1, and top-5 where there are more than five classes; or mAP and F1."""
        return self.labels.metrics()

    def update(self, metrics: "MetricCollection", output: Tensor, batch: Batch) -> None:
        """Counts the logits of one batch in.

        Raises:
            UserError: the targets are of another kind.
        """
        wrong = self.labels.misfit(batch.targets)
        if wrong is not None:
            raise UserError(f"test data: {wrong}")
        self.labels.update(metrics, output, batch.targets)

    def answers(self, output: Tensor) -> Tensor:
        """The classes with the highest scores, `(B,)`; of several labels a picture, rows `(B, K)`."""
        return self.labels.answers(output)

    @property
    def chance(self) -> float | None:
        """One class in K; of several labels a picture nothing is known."""
        return None if self.independent else 1 / self.num_classes

    def check_output(self, output: Any, model: str) -> None:
        """Raises UserError unless the output is logits `(B, K)` of the data's K classes."""
        if not isinstance(output, Tensor) or output.dim() != 2:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(f"{model} gives {shape}, classification needs logits (B, {self.num_classes})")
        if not output.is_floating_point():
            kind = str(output.dtype).removeprefix("torch.")
            raise UserError(f"{model} gives {kind}, classification needs logits in floating point")
        if output.shape[1] != self.num_classes:
            raise UserError(
                f"{model} has {output.shape[1]} classes, the data has {self.num_classes}; "
                "build it with as many classes, or bring weights made for this data"
            )
