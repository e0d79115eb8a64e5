"""Where a detector errs: classes, sizes of objects, the worst pictures."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from diffkd.batch import Batch
from diffkd.report.faults.base import Account, Keep, Worst, ratio
from diffkd.tasks.base import Figures
from diffkd.use.drawing import draw_boxes, picture_of, rgb

OVERLAP, SCORE = 0.5, 0.3  # IoU from which a box is found; least score that counts as an answer
SIZES = {"small": 32**2, "medium": 96**2, "large": np.inf}  # COCO's, pixels of area, less than
_SHOWN = 12
_SIDES = 180, 236  # pixels of a picture on the sheet: four stand side by side


class BoxAccount(Account):
    """Counts objects found and missed, and answers that stand for none.

    Args:
        names: of the classes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.counts = np.zeros((3, len(names)), np.int64)  # objects, found ones, answers for nothing
        self.sizes = {size: np.zeros(2, np.int64) for size in SIZES}  # objects, found ones
        self.keep = Keep(_SHOWN)

    def add(self, batch: Batch, output: Any) -> None:
        """Takes per picture `boxes` `(n, 4)`, `scores` `(n,)` and `labels` `(n,)`."""
        assert batch.targets is not None
        assert batch.indices is not None
        for place, (index, truth, found) in enumerate(
            zip(batch.indices.tolist(), batch.targets, output, strict=True)
        ):
            true = {key: value.cpu() for key, value in truth.items() if isinstance(value, Tensor)}
            ours = {key: value.detach().cpu() for key, value in found.items()}
            ours = {key: value[ours["scores"] >= SCORE] for key, value in ours.items()}
            hit, false = matched(ours, true)
            counts = self._count(true, hit, ours["labels"][false])
            wrong = counts[1] + counts[2]
            if wrong:
                bad = wrong / (2 * counts[0] + wrong)  # 1 - F1
                origin = truth.get("origin")
                make = partial(self._worst, batch, place, index, true, ours, origin, bad, counts)
                self.keep.add(bad, index, make)

    def _count(self, true: dict[str, Tensor], hit: Tensor, false: Tensor) -> tuple[int, int, int]:
        """Counts a picture in; gives how many objects are found and missed, and answers for nothing."""
        there = ~ignored(true)
        labels, found = true["labels"][there], hit[there]
        count = len(self.names)
        self.counts += np.stack(
            [torch.bincount(which, minlength=count).numpy() for which in (labels, labels[found], false)]
        )
        area = true.get("area", (true["boxes"][:, 2:] - true["boxes"][:, :2]).prod(1))[there]
        low = 0.0
        for size, high in SIZES.items():
            these = (area >= low) & (area < high)
            self.sizes[size] += (int(these.sum()), int((these & found).sum()))
            low = high
        return int(found.sum()), int((~found).sum()), len(false)

    def _worst(
        self,
        batch: Batch,
        place: int,
        index: int,
        true: dict[str, Tensor],
        ours: dict[str, Tensor],
        origin: tuple[int, int] | None,
        bad: float,
        counts: tuple[int, int, int],
    ) -> Worst:
        draw = partial(draw_boxes, picture_of(rgb(batch.images[place])), origin=origin, sides=_SIDES)
        truth = draw(true["boxes"], true["labels"], self.names)
        answer = draw(ours["boxes"], ours["labels"], self.names, ours["scores"])
        facts = {"f1": round(1 - bad, 6), **dict(zip(("found", "missed", "false"), counts, strict=True))}
        line = f"found {counts[0]}, missed {counts[1]}, false {counts[2]}: truth, answer"
        return Worst(index, line, facts, (truth, answer))

    def tables(self, figures: Figures) -> dict[str, list[dict[str, Any]]]:
        """AP of each class and size, with how many objects are found and missed at score 0.3 and IoU 0.5."""
        precision = figures.arrays.get("ap_per_class") or [None] * len(self.names)
        classes = [
            {"class": name, "ap": precision[i], "objects": int(objects), "found": int(found)}
            | {"recall": ratio(int(found), int(objects)), "false": int(false)}
            for i, (name, (objects, found, false)) in enumerate(zip(self.names, self.counts.T, strict=True))
        ]
        sizes = [
            {
                "size": size,
                "ap": figures.scalars.get(f"ap_{size}"),
                "objects": int(objects),
                "found": int(found),
            }
            | {"recall": ratio(int(found), int(objects))}
            for size, (objects, found) in self.sizes.items()
        ]
        return {"classes": classes, "sizes": sizes}

    def sheet(self) -> list[Worst]:
        """The pictures of the lowest F1."""
        return self.keep.worst()


def ignored(true: dict[str, Tensor]) -> Tensor:
    """Which objects of a picture count neither way, `(n,)` bool."""
    return true.get("ignore", torch.zeros(len(true["labels"]))).bool()


def matched(ours: dict[str, Tensor], true: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which objects are found, `(m,)`, and which answers stand for none, `(n,)`, as bool.

    Answers take their object in the order of their scores: of their own class, of an IoU of 0.5 at least,
    and each object once. An answer on an ignored object is neither right nor wrong.

    >>> box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    >>> ours = {"boxes": box.repeat(2, 1), "scores": torch.tensor([0.5, 0.9]), "labels": torch.tensor([1, 1])}
    >>> hit, false = matched(ours, {"boxes": box, "labels": torch.tensor([1])})
    >>> hit.tolist(), false.tolist()
    ([True], [True, False])
    """
    passed = ignored(true)
    hit, false = (
        torch.zeros(len(passed), dtype=torch.bool),
        torch.zeros(len(ours["labels"]), dtype=torch.bool),
    )
    if not len(passed):
        return hit, ~false
    overlap = box_iou(ours["boxes"].float(), true["boxes"].float())
    overlap = overlap.masked_fill(ours["labels"][:, None] != true["labels"][None], 0)
    for answer in ours["scores"].argsort(descending=True, stable=True).tolist():
        free = overlap[answer].masked_fill(hit | passed, 0)
        if float(free.max()) >= OVERLAP:
            hit[free.argmax()] = True
        else:
            false[answer] = float(overlap[answer].masked_fill(~passed, 0).max()) < OVERLAP
    return hit, false
