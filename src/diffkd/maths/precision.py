"""Average precision of detected boxes: COCO's and Pascal VOC's, over a whole data set."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from diffkd.errors import UserError

_SIZES = ("ap_small", "ap_medium", "ap_large")
Boxes = Mapping[str, Tensor]


class BoxPrecision(Metric):
    """AP (COCO: mean over IoU 0.5 to 0.95), AP50, AP75, by size, by class; and VOC's AP50.

    Boxes are `(n, 4)`: left, top, right, bottom in pixels of the picture as it came; labels count from 0.
    COCO's figures are those of `faster-coco-eval`. Figures that nothing stands for are left out (AP of
    small objects where there are none), or NaN in `ap_per_class`.

    Args:
        num_classes: K.

    Raises:
        UserError: `faster-coco-eval` is not installed.

    >>> metric = BoxPrecision(2)
    >>> box = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
    >>> truth = {"boxes": box, "labels": torch.tensor([1])}
    >>> metric.update([truth | {"scores": torch.tensor([0.9])}], [truth], torch.tensor([0]))
    >>> found = metric.compute()
    >>> round(found["ap"].item(), 3), round(found["voc_ap50"].item(), 3)
    (1.0, 1.0)
    """

    full_state_update = False
    pictures: list[Tensor]
    found: list[Tensor]
    truth: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        _evaluator()
        self.num_classes = num_classes
        for name in ("pictures", "found", "truth"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, found: Sequence[Boxes], truth: Sequence[Boxes], indices: Tensor) -> None:
        """Counts pictures in, each once in the whole evaluation.

        Args:
            found: per picture `boxes` `(n, 4)`, `scores` `(n,)`, `labels` `(n,)`.
            truth: per picture `boxes`, `labels`, and where there are such things `ignore` `(m,)` bool
                (crowds, difficult objects: finding them is neither right nor wrong) and `area` `(m,)`.
            indices: `(B,)` int64, which pictures of the data set these are.
        """
        self.pictures.append(indices.to(self.device).float())
        for ours, true, index in zip(found, truth, indices, strict=True):
            self.found.append(_rows(index, ours["labels"], ours["boxes"], ours["scores"]))
            sides = true["boxes"][:, 2:] - true["boxes"][:, :2]
            ignore = true.get("ignore", torch.zeros_like(true["labels"]))
            area = true.get("area", sides.prod(1))
            self.truth.append(_rows(index, true["labels"], true["boxes"], area, ignore))

    def compute(self) -> dict[str, Tensor]:
        """Figures by name, 0 to 1; `ap_per_class` is `(K,)`."""
        pictures, found, truth = (
            dim_zero_cat(rows).cpu().numpy().reshape(-1, width)
            for rows, width in ((self.pictures, 1), (self.found, 7), (self.truth, 8))
        )
        figures = coco_precision(pictures, found, truth, self.num_classes)
        figures["voc_ap50"] = voc_precision(found, truth, self.num_classes)
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in figures.items()}


def _rows(index: Tensor, labels: Tensor, boxes: Tensor, *more: Tensor) -> Tensor:
    """Picture, label, box, further numbers of each box, one after the other.

    Flat, as an empty state of a process without pictures is when they are gathered.
    """
    columns = [index.to(labels.device).expand(len(labels)), labels]
    first = torch.stack([column.float() for column in columns], 1)
    rest = [x.float()[:, None] for x in more]
    return torch.cat([first, boxes.float().reshape(-1, 4), *rest], 1).detach().flatten()


def _evaluator() -> tuple[Any, Any]:
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise UserError(
            "average precision needs 'faster-coco-eval': pip install 'diffkd[detection]'"
        ) from error
    return COCO, COCOeval_faster


def coco_precision(
    pictures: np.ndarray, found: np.ndarray, truth: np.ndarray, num_classes: int
) -> dict[str, Any]:
    """COCO's figures of answers about pictures.

    Args:
        pictures: `(N,)` numbers of all pictures, with objects or without.
        found: `(n, 7)`: picture, label, left, top, right, bottom, score.
        truth: `(m, 8)`: picture, label, left, top, right, bottom, area, whether it is ignored.
        num_classes: K.
    """
    kind, evaluation = _evaluator()
    true = kind(
        {
            "info": {},
            "images": [{"id": int(p) + 1} for p in np.unique(pictures)],
            "categories": [{"id": k + 1, "name": str(k)} for k in range(num_classes)],
            "annotations": [
                {**_annotation(row, i), "area": float(row[6]), "iscrowd": int(row[7])}
                for i, row in enumerate(truth)
            ],
        }
    )
    answers = [{**_annotation(row, i), "score": float(row[6])} for i, row in enumerate(found)]
    run = evaluation(true, true.loadRes(answers), "bbox")
    run.evaluate()
    run.accumulate()
    precision = run.eval["precision"]  # (IoU thresholds, recalls, classes, areas, most answers)
    overall = {
        "ap": _mean_known(precision[..., 0, -1], (0, 1, 2)),
        "ap50": _mean_known(precision[0, :, :, 0, -1], (0, 1)),
        "ap75": _mean_known(precision[5, :, :, 0, -1], (0, 1)),
    }
    sizes = {n: _mean_known(precision[..., a, -1], (0, 1, 2)) for a, n in enumerate(_SIZES, 1)}
    return {
        **{name: np.nan_to_num(value) for name, value in overall.items()},
        **{name: value for name, value in sizes.items() if not np.isnan(value)},
        "ap_per_class": _mean_known(precision[..., 0, -1], (0, 1)),
    }


def _annotation(row: np.ndarray, number: int) -> dict[str, Any]:
    left, top, right, bottom = row[2:6].tolist()
    return {
        "id": number + 1,
        "image_id": int(row[0]) + 1,
        "category_id": int(row[1]) + 1,
        "bbox": [left, top, right - left, bottom - top],
    }


def _mean_known(values: np.ndarray, axes: tuple[int, ...]) -> Any:
    """Mean over axes of the values that are not -1, by which the evaluation means none; NaN of none."""
    known = values > -1
    total, count = np.where(known, values, 0).sum(axes), known.sum(axes)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def voc_precision(found: np.ndarray, truth: np.ndarray, num_classes: int, overlap: float = 0.5) -> float:
    """Pascal VOC's mean AP (all points, as since 2010), over classes that have objects; 0 of none.

    Args:
        found: `(n, 7)` as for `coco_precision`.
        truth: `(m, 8)`; ignored objects are VOC's difficult ones.
        num_classes: K.
        overlap: IoU from which a box is found.
    """
    values = []
    for k in range(num_classes):
        true = truth[truth[:, 1] == k]
        if (true[:, 7] == 0).any():
            values.append(_voc_class(found[found[:, 1] == k], true, overlap))
    return float(np.mean(values)) if values else 0.0


def _voc_class(found: np.ndarray, truth: np.ndarray, overlap: float) -> float:
    """AP of one class: the area under the precision that falls with recall."""
    taken = np.zeros(len(truth), bool)
    right, wrong = [], []
    for row in found[np.argsort(-found[:, 6], kind="stable")]:
        places = np.flatnonzero(truth[:, 0] == row[0])
        ious = _overlaps(row[2:6], truth[places, 2:6])
        best = places[ious.argmax()] if len(places) and ious.max() >= overlap else None
        if best is not None and truth[best, 7]:
            continue
        hit = best is not None and not taken[best]
        if hit:
            taken[best] = True
        right.append(hit)
        wrong.append(not hit)
    hits, misses = np.cumsum(right), np.cumsum(wrong)
    recall = np.concatenate([[0.0], hits / (truth[:, 7] == 0).sum(), [1.0]])
    precision = np.concatenate([[0.0], hits / np.maximum(hits + misses, 1), [0.0]])
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * falling[1:]).sum())


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of a box `(4,)` with boxes `(n, 4)`."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    both = (high - low).clip(0).prod(1)
    whole = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - both
    return np.asarray(both / np.maximum(whole, 1e-9))
