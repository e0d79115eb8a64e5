"""Where a segmentation model errs: classes, sizes of regions, the worst pictures."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from diffkd.batch import Batch
from diffkd.pictures.joint import VOID
from diffkd.report.faults.base import Account, Keep, Worst, harmonic, ratio
from diffkd.report.faults.classification import write_confusion
from diffkd.tasks.base import Figures
from diffkd.tasks.segmentation import Segmentation
from diffkd.use.drawing import overlay, palette, rgb

SIZES = {"small": 32**2, "medium": 96**2, "large": np.inf}  # pixels of a region, less than; COCO's
_SHOWN = 12


class MapAccount(Account):
    """Counts pixels by class and by the size of the region that they belong to.

    Args:
        names: of the classes.
        task: says what the answers are.
    """

    def __init__(self, names: Sequence[str], task: Segmentation) -> None:
        super().__init__(names)
        self.task = task
        self.sizes = {size: np.zeros(3, np.int64) for size in SIZES}  # regions, pixels, right ones
        self.keep = Keep(_SHOWN)
        self.colours = torch.cat(
            [palette(len(names)), torch.full((256 - len(names), 3), 90, dtype=torch.uint8)]
        )

    def add(self, batch: Batch, output: Any) -> None:
        """Takes scores `(B, K, H, W)`, or a list of `(K, H, W)`."""
        assert batch.targets is not None
        assert batch.indices is not None
        answers = self.task.answers(output)
        for place, (index, truth, answer) in enumerate(
            zip(batch.indices.tolist(), batch.targets, answers, strict=True)
        ):
            truth, answer = truth.cpu(), answer.cpu()
            self._regions(truth.numpy(), answer.numpy())
            score = picture_iou(answer, truth, len(self.names))
            if score is not None and score < 1:
                make = partial(self._worst, batch, place, index, truth, answer, score)
                self.keep.add(1 - score, index, make)

    def _regions(self, truth: np.ndarray, answer: np.ndarray) -> None:
        """Counts the connected regions of each class but the first, which is often the ground."""
        right = truth == answer
        for value in np.unique(truth).tolist():
            if value in (0, VOID):
                continue
            regions, count = ndimage.label(truth == value)
            pixels = np.bincount(regions.ravel(), minlength=count + 1)[1:]
            hits = np.bincount(regions.ravel(), right.ravel(), minlength=count + 1)[1:]
            low = 0.0
            for size, high in SIZES.items():
                these = (pixels >= low) & (pixels < high)
                self.sizes[size] += (int(these.sum()), int(pixels[these].sum()), int(hits[these].sum()))
                low = high

    def _worst(
        self, batch: Batch, place: int, index: int, truth: Tensor, answer: Tensor, score: float
    ) -> Worst:
        image = rgb(batch.images[place])
        seen = (overlay(image, labels, self.colours) for labels in (truth, answer))
        says = f"mIoU {100 * score:.1f} %: picture, truth, answer"
        return Worst(index, says, {"miou": round(score, 6)}, (image, *seen))

    def tables(self, figures: Figures) -> dict[str, list[dict[str, Any]]]:
        """IoU, recall, precision and share of each class; the recall of small and large regions."""
        confusion = np.array(figures.arrays["confusion"])
        right, answered, true = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
        classes = []
        for i, name in enumerate(self.names):
            precision, recall = ratio(int(right[i]), int(answered[i])), ratio(int(right[i]), int(true[i]))
            classes.append(
                {"class": name, "iou": figures.arrays["iou"][i], "recall": recall, "precision": precision}
                | {"f1": harmonic(precision, recall), "share": ratio(int(true[i]), int(true.sum()))}
            )
        sizes = [
            {"size": size, "regions": int(regions), "recall": ratio(int(hits), int(pixels))}
            for size, (regions, pixels, hits) in self.sizes.items()
        ]
        return {"classes": classes, "sizes": sizes}

    def sheet(self) -> list[Worst]:
        """The pictures of the lowest mIoU, over the classes in them."""
        return self.keep.worst()

    def draw(self, folder: Path, figures: Figures) -> None:
        """The confusion matrix in pixels."""
        write_confusion(folder, np.array(figures.arrays["confusion"]), self.names)


def picture_iou(answer: Tensor, truth: Tensor, classes: int) -> float | None:
    """Mean IoU of one picture over the classes in its truth; None where it is all void.

    Args:
        answer: classes `(H, W)`.
        truth: the same shape; 255 does not count.
        classes: K.

    >>> picture_iou(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 255]]), 2)
    0.5
    """
    there = truth != VOID
    ours, true = answer[there].long(), truth[there].long()
    both = torch.bincount(true[ours == true], minlength=classes)
    of_truth = torch.bincount(true, minlength=classes)
    union = of_truth + torch.bincount(ours, minlength=classes) - both
    known = of_truth > 0
    return float((both[known] / union[known]).mean()) if bool(known.any()) else None
