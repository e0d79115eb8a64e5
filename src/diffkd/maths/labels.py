"""Average precision of classes that do not exclude one another, as torchmetrics computes it."""

import warnings

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score
from torchmetrics.utilities import dim_zero_cat


def label_metrics(count: int) -> MetricCollection:
    """Mean average precision over the classes that occur, that of each class, and F1 at one half.

    Args:
        count: K, the number of classes; `update` takes probabilities `(B, K)` and rows of 0 and 1.

    >>> import torch
    >>> metrics = label_metrics(3)
    >>> metrics.update(torch.tensor([[0.9, 0.1, 0.2], [0.2, 0.8, 0.1]]), torch.tensor([[1, 0, 0], [0, 1, 0]]))
    >>> metrics.compute()["map"], metrics.compute()["ap"]
    (tensor(1.), tensor([1., 1., nan]))
    """
    return MetricCollection(
        {
            "map": _MeanPrecision(count, average=None),
            "f1": MultilabelF1Score(count, average="micro"),
            "ap": _Precision(count, average=None),
        },
        compute_groups=[["map", "ap"], ["f1"]],
    )


class _Precision(MultilabelAveragePrecision):
    """Average precision of each class `(K,)`, NaN where no picture shows it."""

    def compute(self) -> Tensor:  # type: ignore[override]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes without a picture: they are NaN, and left out
            found = super().compute()
        shown = dim_zero_cat(self.target).sum(0) > 0
        return found.masked_fill(~shown, float("nan"))


class _MeanPrecision(_Precision):
    """Its mean over the classes that pictures show."""

    def compute(self) -> Tensor:  # type: ignore[override]
        return super().compute().nanmean()
