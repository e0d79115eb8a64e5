"""Where a classifier errs: confusion, classes, confidence, and the errors that it is surest of."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkd.batch import Batch
from diffkd.report.faults.base import SHOWN, Account, Keep, Worst, harmonic, ratio
from diffkd.report.faults.sheet import confusion_picture, reliability_picture
from diffkd.runs.disk import write_atomically
from diffkd.tasks.base import Figures
from diffkd.use.drawing import rgb

BINS = 15  # of the calibration error, as Guo et al. (arXiv 1706.04599) have them
_LEFT_OUT = -100


class ClassAccount(Account):
    """Counts answers by class and by confidence.

    Args:
        names: of the classes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        count = len(names)
        self.confusion = np.zeros((count, count), np.int64)
        self.bins = np.zeros((3, BINS))  # pictures, sum of confidence, right answers
        self.keep = Keep(SHOWN)

    def add(self, batch: Batch, output: Tensor) -> None:
        """Takes logits `(B, K)`; of class probabilities as targets the largest is the class."""
        assert batch.targets is not None
        assert batch.indices is not None
        truth = batch.targets.argmax(1) if batch.targets.dim() == 2 else batch.targets
        sure, answer = output.float().softmax(1).max(1)
        sure = sure.nan_to_num(0)  # of a student that has gone astray
        rows = torch.stack(
            [batch.indices.to(truth.device).double(), truth.double(), answer.double(), sure.double()]
        )
        for place, (index, true, ours, confidence) in enumerate(rows.T.tolist()):
            if true == _LEFT_OUT:
                continue
            true, ours = int(true), int(ours)
            self.confusion[true, ours] += 1
            self.bins[:, min(int(confidence * BINS), BINS - 1)] += (1, confidence, true == ours)
            if true != ours:
                make = partial(self._worst, batch, place, int(index), true, ours, confidence)
                self.keep.add(confidence, int(index), make)

    def _worst(self, batch: Batch, place: int, index: int, truth: int, answer: int, sure: float) -> Worst:
        true, ours = self.names[truth], self.names[answer]
        facts = {"truth": true, "answer": ours, "confidence": round(sure, 6)}
        says = f"{ours} {100 * sure:.0f} %\nis {true}"
        return Worst(index, says, facts, (rgb(batch.images[place]),))

    def scalars(self) -> dict[str, float]:
        """`ece`: the expected calibration error, 0 to 1."""
        return {"ece": calibration_error(self.bins)}

    def tables(self, figures: Figures) -> dict[str, list[dict[str, Any]]]:
        """Precision, recall and F1 of each class; the ten commonest confusions; reliability by confidence."""
        right, answered, true = self.confusion.diagonal(), self.confusion.sum(0), self.confusion.sum(1)
        classes = []
        for i, name in enumerate(self.names):
            precision, recall = ratio(int(right[i]), int(answered[i])), ratio(int(right[i]), int(true[i]))
            classes.append(
                {"class": name, "pictures": int(true[i]), "recall": recall, "precision": precision}
                | {"f1": harmonic(precision, recall)}
            )
        wrong = self.confusion - np.diag(right)
        most = [divmod(int(place), len(wrong)) for place in np.argsort(-wrong, axis=None, kind="stable")[:10]]
        confused = [
            {
                "truth": self.names[i],
                "answer": self.names[j],
                "pictures": int(wrong[i, j]),
                "share": ratio(int(wrong[i, j]), int(true[i])),
            }
            for i, j in most
            if wrong[i, j]
        ]
        reliability = [
            {"confidence": sure, "right": share, "pictures": count}
            for sure, share, count in _points(self.bins)
        ]
        return {"classes": classes, "confused": confused, "reliability": reliability}

    def sheet(self) -> list[Worst]:
        """The errors that the student was surest of."""
        return self.keep.worst()

    def draw(self, folder: Path, figures: Figures) -> None:
        """The confusion matrix as table and picture, and the reliability diagram."""
        write_confusion(folder, self.confusion, self.names)
        reliability_picture(_points(self.bins), calibration_error(self.bins), folder / "reliability.png")


def write_confusion(folder: Path, confusion: np.ndarray, names: Sequence[str]) -> None:
    """`confusion.csv` and `confusion.png`: rows are the truth, columns the answers."""
    head = ["truth \\ answer", *names]
    lines = [head] + [[name, *map(str, row)] for name, row in zip(names, confusion.tolist(), strict=True)]
    text = "\n".join(",".join(_quoted(cell) for cell in line) for line in lines) + "\n"
    write_atomically(folder / "confusion.csv", lambda place: place.write_text(text, encoding="utf-8"))
    confusion_picture(confusion, names, folder / "confusion.png")


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if any(sign in cell for sign in ',"\n') else cell


def _points(bins: np.ndarray) -> list[tuple[float, float, int]]:
    """Mean confidence, share of right answers and number of pictures, of each bin that has some."""
    return [(sure / count, right / count, int(count)) for count, sure, right in bins.T.tolist() if count]


def calibration_error(bins: np.ndarray) -> float:
    """The expected calibration error: how far confidence is from being right, mean over the pictures.

    Args:
        bins: `(3, n)`: pictures, sum of their confidence, right answers, of each bin.

    >>> calibration_error(np.array([[10.0, 10.0], [5.0, 9.0], [5.0, 7.0]]))
    0.1
    """
    total = bins[0].sum()
    return float(np.abs(bins[1] - bins[2]).sum() / total) if total else 0.0
