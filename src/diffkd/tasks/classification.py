"""Image classification: one class per picture."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.data.base import Data, Split
from diffkd.errors import UserError
from diffkd.features.outputs import class_scores
from diffkd.tasks.base import Task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

_LEFT_OUT = -100  # of the loss: PyTorch's own number for it
_COUNT = "mend it, or set the data's num_classes"
_NEAR = 1e-2  # probabilities in half precision sum to 1 as nearly


class Classification(Task):
    """Cross-entropy on logits `(B, K)`; top-1 accuracy, and top-5 where there are more classes.

    Targets are class indices `(B,)` (-100 is left out of the loss), class probabilities `(B, K)` (mixup,
    cutmix), or None.
    Models give logits `(B, K)`, an object or dict with `logits`, or a tuple that begins with them; what
    they give of auxiliary heads in training is a loss of its own, `auxiliary`.

    Args:
        data: the data set; its number of classes must be known.
        label_smoothing: share of the target probability spread evenly over all classes.
        auxiliary_weight: of each auxiliary head's cross-entropy; None is 0.4 for a single head (Inception
            v3, arXiv 1512.00567), 0.3 for each of several (GoogLeNet, arXiv 1409.4842).

    Raises:
        UserError: the data set has no classes, or an option is out of range.
    """

    metric = "top1"
    metric_label = "top-1"

    def __init__(
        self, data: Data, *, label_smoothing: float = 0.0, auxiliary_weight: float | None = None
    ) -> None:
        super().__init__(data)
        if data.num_classes is None:
            raise UserError("task 'classification' needs a data set with classes")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"task.label_smoothing={label_smoothing}: needs at least 0 and less than 1")
        if auxiliary_weight is not None and auxiliary_weight < 0:
            raise UserError(f"task.auxiliary_weight={auxiliary_weight}: needs at least 0")
        self.num_classes = data.num_classes
        self.label_smoothing = label_smoothing
        self.auxiliary_weight = auxiliary_weight
        self._wrong: Tensor | None = None  # targets met so far that are no classes, and one of them

    def loss(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of logits `(B, K)`, and of auxiliary heads; empty without targets."""
        if batch.targets is None:
            return {}
        scores, heads = class_scores(output)
        targets = self._usable(batch.targets)
        losses = {"cross_entropy": self._cross_entropy(scores, targets)}
        if heads:
            usual = 0.4 if len(heads) == 1 else 0.3
            weight = usual if self.auxiliary_weight is None else self.auxiliary_weight
            several = torch.stack([self._cross_entropy(head, targets) for head in heads])
            losses["auxiliary"] = weight * several.sum()
        return losses

    def _cross_entropy(self, scores: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(scores.float(), targets, label_smoothing=self.label_smoothing)

    def _usable(self, targets: Tensor) -> Tensor:
        """Targets that the loss takes; what is wrong is remembered, and the host does not wait."""
        if targets.dim() == 1:
            values = targets.long()
            wrong = ((values < 0) | (values >= self.num_classes)) & (values != _LEFT_OUT)
            usable = values.masked_fill(wrong, _LEFT_OUT)
        else:
            usable = targets.float()
            values = usable.sum(1)
            wrong = ~(((values - 1).abs() < _NEAR) & (usable >= 0).all(1))
        example = values.detach().float().masked_fill(~wrong, float("-inf")).amax()
        now = torch.stack([wrong.sum().float(), example])
        before = now.new_tensor([0, float("-inf")]) if self._wrong is None else self._wrong
        self._wrong = torch.stack([before[0] + now[0], torch.maximum(before[1], now[1])])
        return usable

    def check_seen(self) -> None:
        """Raises UserError where training met targets that are no classes and no probabilities."""
        count, example = (0.0, 0.0) if self._wrong is None else self._wrong.tolist()
        self._wrong = None
        if count:
            raise UserError(
                f"training data: {count:.0f} targets are neither classes of 0 to {self.num_classes - 1} nor "
                f"probabilities that sum to 1 (found: {example:g}); mend them, or set the data's num_classes"
            )

    def check_data(self, first: Callable[[Split], Any]) -> None:
        """Raises UserError unless the first targets are class indices or class probabilities."""
        for what, split in (("training", self.data.train), ("test", self.data.test)):
            targets = first(split)
            wrong = None if targets is None else self._misfit(targets)
            if wrong is not None:
                raise UserError(f"{what} data: {wrong}")

    def _misfit(self, targets: Any) -> str | None:
        """What targets are that the task cannot use, and the way out."""
        count = self.num_classes
        wanted = f"classification needs class indices (B,), integers of 0 to {count - 1}"
        if not isinstance(targets, Tensor):
            return f"the targets are a {type(targets).__name__}; {wanted}"
        kind, shape = str(targets.dtype).removeprefix("torch."), tuple(targets.shape)
        whole = not targets.is_floating_point() and not targets.is_complex()
        if targets.dim() == 1 and whole:
            bad = targets[((targets < 0) | (targets >= count)) & (targets != _LEFT_OUT)]
            return f"target {bad[0]} is no class of 0 to {count - 1}; {_COUNT}" if len(bad) else None
        if targets.dim() != 2 or targets.shape[1] != count:
            return f"the targets are {kind} {shape}; {wanted}"
        sums = targets.double().sum(1)
        binary = bool(((targets == 0) | (targets == 1)).all())
        if binary and bool((sums != 1).any()):
            return (
                f"the targets are multi-hot {shape}, several classes or none for a picture; {wanted}; "
                "several need a task of your own: task=my_tasks.py:MyTask"
            )
        if whole:
            found = "one-hot" if binary else kind
            return f"the targets are {found} {shape}; {wanted}: give target.argmax() for each picture"
        if bool(((sums - 1).abs() > _NEAR).any()) or bool((targets < 0).any()):
            far = sums[(sums - 1).abs().argmax()]
            return (
                f"the targets {shape} are no probabilities: a row sums to {far:.3g}; give class indices, or "
                "target.softmax(0) of scores"
            )
        return None

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """Logits `(B, K)` of the main head."""
        return class_scores(self.run(model, batch))[0]

    def metrics(self) -> "MetricCollection":
        """Top-1, and top-5 where there are more than five classes."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        kinds = {"top1": 1} | ({"top5": 5} if self.num_classes > 5 else {})
        return MetricCollection(
            {
                name: MulticlassAccuracy(self.num_classes, top_k=k, average="micro")
                for name, k in kinds.items()
            },
            compute_groups=False,
        )

    def update(self, metrics: "MetricCollection", output: Tensor, batch: Batch) -> None:
        """Counts the logits of one batch in; of class probabilities the largest is the class.

        Raises:
            UserError: the targets are no classes.
        """
        wrong = self._misfit(batch.targets)
        if wrong is not None:
            raise UserError(f"test data: {wrong}")
        metrics.update(output, batch.targets.argmax(1) if batch.targets.dim() == 2 else batch.targets)

    def answers(self, output: Tensor) -> Tensor:
        """The classes with the highest scores, `(B,)`."""
        return output.argmax(1)

    @property
    def chance(self) -> float | None:
        """One class in K."""
        return 1 / self.num_classes

    def check_output(self, output: Any, model: str) -> None:
        """Raises UserError unless the output is logits `(B, K)` of the data's K classes."""
        if not isinstance(output, Tensor) or output.dim() != 2:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(f"{model} gives {shape}, classification needs logits (B, {self.num_classes})")
        if output.shape[1] != self.num_classes:
            raise UserError(
                f"{model} has {output.shape[1]} classes, the data has {self.num_classes}; "
                "build it with as many classes, or bring weights made for this data"
            )
