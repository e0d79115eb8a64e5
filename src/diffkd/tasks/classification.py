"""Image classification: one class per picture."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from diffkd.batch import Batch
from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.features.outputs import class_scores
from diffkd.tasks.base import Task


class Classification(Task):
    """Cross-entropy on logits `(B, K)`; top-1 accuracy, and top-5 where there are more classes.

    Targets are class indices `(B,)`, class probabilities `(B, K)` (mixup, cutmix), or None.
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

    def loss(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of logits `(B, K)`, and of auxiliary heads; empty without targets."""
        if batch.targets is None:
            return {}
        scores, heads = class_scores(output)
        losses = {"cross_entropy": self._cross_entropy(scores, batch.targets)}
        if heads:
            usual = 0.4 if len(heads) == 1 else 0.3
            weight = usual if self.auxiliary_weight is None else self.auxiliary_weight
            several = torch.stack([self._cross_entropy(head, batch.targets) for head in heads])
            losses["auxiliary"] = weight * several.sum()
        return losses

    def _cross_entropy(self, scores: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(scores.float(), targets, label_smoothing=self.label_smoothing)

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """Logits `(B, K)` of the main head."""
        return class_scores(self.run(model, batch))[0]

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
