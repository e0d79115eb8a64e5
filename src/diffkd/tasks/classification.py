"""Image classification: one class per picture."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from diffkd.batch import Batch
from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.tasks.base import Task


class Classification(Task):
    """Cross-entropy on logits `(B, K)`; top-1 accuracy, and top-5 where there are more classes.

    Targets are class indices `(B,)`, class probabilities `(B, K)` (mixup, cutmix), or None.

    Args:
        data: the data set; its number of classes must be known.
        label_smoothing: share of the target probability spread evenly over all classes.

    Raises:
        UserError: the data set has no classes, or the smoothing is out of range.
    """

    metric = "top1"
    metric_label = "top-1"

    def __init__(self, data: Data, *, label_smoothing: float = 0.0) -> None:
        super().__init__(data)
        if data.num_classes is None:
            raise UserError("task 'classification' needs a data set with classes")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"task.label_smoothing={label_smoothing}: needs at least 0 and less than 1")
        self.num_classes = data.num_classes
        self.label_smoothing = label_smoothing

    def loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of logits `(B, K)`; empty without targets."""
        if batch.targets is None:
            return {}
        loss = F.cross_entropy(output.float(), batch.targets, label_smoothing=self.label_smoothing)
        return {"cross_entropy": loss}

    def metrics(self) -> MetricCollection:
        """Top-1, and top-5 where there are more than five classes."""
        kinds = {"top1": 1} | ({"top5": 5} if self.num_classes > 5 else {})
        return MetricCollection(
            {
                name: MulticlassAccuracy(self.num_classes, top_k=k, average="micro")
                for name, k in kinds.items()
            },
            compute_groups=False,
        )

    def update(self, metrics: MetricCollection, output: Tensor, batch: Batch) -> None:
        """Counts the logits of one batch in."""
        metrics.update(output, batch.targets)

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
