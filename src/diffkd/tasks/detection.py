"""Object detection: boxes with classes and scores, in pictures of any size."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from diffkd.batch import Batch, Frame
from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.maths.precision import BoxPrecision
from diffkd.tasks.base import Task

_SCORES = "head.classification_head"  # gives (B, places and anchors, K + 1)
Detections = list[dict[str, Tensor]]
_SURE = 0.5  # score from which a teacher's answer stands for the truth


class Detection(Task):
    """Boxes; the detector's own losses; COCO's AP.

    Targets are a list of dicts with `boxes` `(n, 4)` (left, top, right, bottom in pixels of the picture)
    and `labels` `(n,)` from 0; maybe `ignore` `(n,)` bool (not trained on, counted as the metric says),
    `area` `(n,)`, and `origin`, the `(H, W)` that the picture had before it was resized: boxes of answers
    are in pixels of that.

    A detector keeps torchvision's contract. In training `model(images, targets)` gives a dict of losses;
    else `model(images)` gives a list of dicts with `boxes`, `scores` `(n,)` and `labels` `(n,)`. Labels
    start at 1 there, for 0 is the ground. `model.backbone(images)` gives the pyramid, a dict of maps or
    one: that is what a teacher runs and what is distilled where no taps are named. Images are `(B, 3, H, W)`,
    normalised, padded with zeros at the bottom and the right.

    Args:
        data: the data set; its number of classes must be known.
        divisor: padded sides are multiples of it: the largest stride that maps should divide.
        scores: also tap the class scores of the head, `(B, K + 1, L)` over all places and levels.

    Raises:
        UserError: the data set has no classes, an option is out of range, or `faster-coco-eval` is missing.
    """

    metric = "ap"
    metric_label = "AP"
    resizes = False
    mixes = False

    def __init__(self, data: Data, *, divisor: int = 32, scores: bool = False) -> None:
        super().__init__(data)
        if data.num_classes is None:
            raise UserError("task 'detection' needs a data set with classes")
        if divisor < 1:
            raise UserError(f"task.divisor={divisor}: needs at least 1")
        self.num_classes, self.divisor, self.scores = data.num_classes, divisor, scores
        self.logits = (_SCORES,) if scores else ()  # type: ignore[misc]
        self.metrics()  # what it needs is missed now, not after an epoch

    # --- pictures ----------------------------------------------------------------------------------

    def frame(self, batch: Batch) -> Batch:
        """Pictures of different sizes padded to one, `(B, 3, H, W)`, with where each lies in it."""
        if batch.frames is not None:
            return batch
        images = list(batch.images)
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (-(-max(side) // self.divisor) * self.divisor for side in zip(*sizes, strict=True))
        targets = batch.targets or [{}] * len(images)
        frames = tuple(Frame(size, t.get("origin", size)) for size, t in zip(sizes, targets, strict=True))
        if all(size == (height, width) for size in sizes):
            return batch._replace(images=torch.stack(images), frames=frames)
        padded = [F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in images]
        valid = torch.zeros(len(images), height, width, dtype=torch.bool, device=padded[0].device)
        for place, (h, w) in zip(valid, sizes, strict=True):
            place[:h, :w] = True
        return batch._replace(images=torch.stack(padded), valid=valid, frames=frames)

    def prepare(self, batch: Batch, preprocess: Callable[[Any], Any]) -> Batch:
        """Normalised; what is padded is zero again, as these detectors' own preparation leaves it."""
        batch = self.frame(batch)
        images = preprocess(batch.images)
        if batch.valid is not None:
            images = images.masked_fill(~batch.valid[:, None], 0)
        return batch._replace(images=images)

    # --- models ------------------------------------------------------------------------------------

    def taps(self, student: nn.Module, teacher: nn.Module) -> dict[str, str] | None:
        """The levels of both pyramids; with `scores`, the heads' class scores.

        Raises:
            UserError: class scores are wanted, and the two heads do not give them for the same places.
        """
        levels = {"backbone": "backbone"}
        if not all(hasattr(model, "backbone") for model in (student, teacher)):
            return None
        if not self.scores:
            return levels
        places = {what: _dense(m) for what, m in (("student", student), ("teacher", teacher))}
        for what, found in places.items():
            if found is None:
                raise UserError(
                    f"task.scores: the {what} has no class scores at every place, as RetinaNet and FCOS do"
                )
        if places["student"] != places["teacher"]:
            raise UserError(
                f"task.scores: anchors a place by level are {places['student']} (student) and "
                f"{places['teacher']} (teacher); give both the same head and levels"
            )
        return levels | {f"{_SCORES}@BLC": f"{_SCORES}@BLC"}

    def train(self, student: nn.Module, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        """The detector's own losses."""
        if batch.targets is None:  # nothing to learn from but the teacher
            return self.teach(student, batch), {}
        losses = _call(student, batch, [_as_taught(target) for target in batch.targets])
        return losses, dict(losses)

    def teach(self, teacher: nn.Module, batch: Batch) -> Any:
        """The pyramid; the head only where something in it is tapped."""
        pyramid = getattr(teacher, "backbone", None)
        if pyramid is None:
            return _call(teacher, batch)
        outside = [m for name, m in teacher.named_children() if name != "backbone" and _watched(m, teacher)]
        if not outside:
            return pyramid(batch.images)
        head = getattr(teacher, "head", None)
        if head is not None and outside == [head]:
            return head(_levels(pyramid(batch.images)))
        return _call(teacher, batch)

    def predict(self, model: nn.Module, batch: Batch) -> Detections:
        """Per picture `boxes` in pixels of the picture as it came, `scores`, and `labels` from 0."""
        found = _call(model, batch)
        frames = batch.frames or [None] * len(found)
        return [_as_answer(answer, frame) for answer, frame in zip(found, frames, strict=True)]

    def check_output(self, output: Any, model: str) -> None:
        """Raises UserError unless answers are a list of boxes, scores and labels."""
        keys = {"boxes", "scores", "labels"}
        if not (isinstance(output, list) and all(isinstance(o, dict) and keys <= set(o) for o in output)):
            raise UserError(
                f"{model} gives {type(output).__name__}, detection needs a list of dicts with "
                "'boxes', 'scores' and 'labels'"
            )

    # --- figures -----------------------------------------------------------------------------------

    def metrics(self) -> MetricCollection:
        """COCO's AP, AP50, AP75, by size and class, and VOC's AP50."""
        return MetricCollection({"boxes": BoxPrecision(self.num_classes)}, compute_groups=False)

    def update(self, metrics: MetricCollection, output: Detections, batch: Batch) -> None:
        """Counts the answers for one loader's batch in."""
        assert batch.indices is not None
        metrics.update(output, batch.targets, batch.indices)

    def answers(self, output: Detections) -> Detections:
        """The boxes that a model is sure of."""
        sure = [answer["scores"] >= _SURE for answer in output]
        return [
            {key: answer[key][keep] for key in ("boxes", "labels")}
            for answer, keep in zip(output, sure, strict=True)
        ]


# --- torchvision's contract ------------------------------------------------------------------------


class _Ready(nn.Module):
    """Stands in for a detector's own preparation: the pictures are prepared already."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = list(sizes)

    def forward(self, images: Tensor, targets: Any = None) -> tuple[ImageList, Any]:
        """The pictures with their true sizes."""
        return ImageList(images, self.sizes), targets

    def postprocess(self, found: Detections, *sizes: Any) -> Detections:
        """Answers as they are: whoever resized the pictures brings the boxes back."""
        return found


@contextmanager
def _prepared(model: nn.Module, batch: Batch) -> Iterator[None]:
    """The model takes the batch's pictures as they are, for the time being."""
    own = getattr(model, "transform", None)
    if not isinstance(own, GeneralizedRCNNTransform):
        yield
        return
    sizes = [frame.size for frame in batch.frames or ()] or [tuple(x.shape[-2:]) for x in batch.images]
    model.transform = _Ready(sizes)
    try:
        yield
    finally:
        model.transform = own


def _call(model: nn.Module, batch: Batch, targets: Any = None) -> Any:
    with _prepared(model, batch):
        return model(batch.images) if targets is None else model(batch.images, targets)


def _as_taught(target: Mapping[str, Any]) -> dict[str, Tensor]:
    """A target without what is ignored, labels from 1."""
    boxes, labels = target["boxes"], target["labels"] + 1
    if "ignore" in target:
        boxes, labels = boxes[~target["ignore"]], labels[~target["ignore"]]
    return {"boxes": boxes, "labels": labels}


def _as_answer(found: Mapping[str, Tensor], frame: Any) -> dict[str, Tensor]:
    """An answer in pixels of the picture as it came, labels from 0, the ground left out."""
    boxes, scores, labels = found["boxes"].float(), found["scores"].float(), found["labels"]
    if frame is not None and frame.size != frame.origin:
        down, across = (was / now for was, now in zip(frame.origin, frame.size, strict=True))
        boxes = boxes * boxes.new_tensor([across, down, across, down])
    keep = labels > 0
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep] - 1}


def _dense(model: nn.Module) -> list[int] | None:
    """Anchors a place of each level, of a model that gives class scores for all of them."""
    head, anchors = getattr(model, "head", None), getattr(model, "anchor_generator", None)
    if not hasattr(head, "classification_head") or anchors is None:
        return None
    return list(anchors.num_anchors_per_location())


def _watched(module: nn.Module, owner: nn.Module) -> bool:
    """Whether anybody but the model itself waits for what runs in a part of it."""
    hooks = (hook for part in module.modules() for hook in part._forward_hooks.values())
    return any(getattr(hook, "__self__", None) is not owner for hook in hooks)


def _levels(pyramid: Any) -> list[Tensor]:
    return list(pyramid.values()) if isinstance(pyramid, Mapping) else [pyramid]
