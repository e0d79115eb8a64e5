"""Semantic segmentation: one class per pixel."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from diffkd.batch import UNLABELLED, Batch
from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.features.defaults import LAST_MAP, SCORES
from diffkd.maths.boundary import BoundaryIoU
from diffkd.pictures.joint import VOID, pad_to
from diffkd.tasks.base import Task

_MASK_FEATURES = "model.pixel_level_module.decoder.mask_projection"  # of Mask2Former, for its queries
AUXILIARY = 0.5  # weight of an auxiliary head's loss, as torchvision trains them


class Segmentation(Task):
    """Cross-entropy per pixel on logits `(B, K, h, w)`; mIoU of the data set's one confusion matrix.

    Targets are label maps `(B, H, W)`, 255 where a pixel is void: it counts in no loss and no figure.
    Logits are resized to the mask, never the mask to the logits. Pictures keep their size; training
    views are padded at the bottom and the right to a multiple that every usual model takes, with void.

    Args:
        data: the data set; its number of classes must be known.
        multiple: of pixels, that the sides of training views are padded to.
        inference: how pictures larger than the training views are evaluated: "slide" averages windows of
            the views' size that overlap by a third, "whole" takes them as they are.
        flip: evaluation averages each picture and its mirror image.
        scales: evaluation averages these sizes of each picture, as factors.
        boundary_ratio: also Boundary IoU (arXiv 2103.16562), near the edges of each class: in a band of
            this share of the picture's diagonal, 0.02 in the paper.

    Raises:
        UserError: the data set has no classes, or an option is out of its range.
    """

    metric = "miou"
    metric_label = "mIoU"
    # of torchvision's, segmentation-models-pytorch's and transformers' models, and of the bare output
    logits = (
        *("", "[out]", "[logits]", "[0]"),
        *("classifier", "segmentation_head.0", "decode_head.classifier"),
    )
    resizes = False
    mixes = False
    unlabelled = True
    half = True

    def __init__(
        self,
        data: Data,
        *,
        multiple: int = 32,
        inference: Literal["slide", "whole"] = "slide",
        flip: bool = False,
        scales: list[float] = [1.0],  # noqa: B006
        boundary_ratio: float | None = None,
    ) -> None:
        super().__init__(data)
        if data.num_classes is None:
            raise UserError("task 'segmentation' needs a data set with classes")
        if multiple < 1:
            raise UserError(f"task.multiple={multiple}: needs 1 pixel or more")
        if not scales or min(scales) <= 0:
            raise UserError(f"task.scales={scales}: needs factors above 0, such as [0.75, 1.0, 1.25]")
        if boundary_ratio is not None and not 0 < boundary_ratio < 1:
            raise UserError(f"task.boundary_ratio={boundary_ratio}: needs a share, such as 0.02")
        self.boundary_ratio = boundary_ratio
        self.num_classes, self.multiple = data.num_classes, multiple
        self.window = tuple(data.image_shape[1:]) if inference == "slide" else None
        self.flip, self.scales = flip, tuple(scales)

    def validity(self, batch: Batch) -> Tensor | None:
        """Every pixel that has a class, `(B, H, W)` bool, as the padded views are seen."""
        if isinstance(batch.targets, Tensor):
            padded: Tensor = self._padded(batch.targets, VOID)
            return padded != VOID
        return batch.valid

    def taps(self, student: nn.Module, teacher: nn.Module) -> dict[str, str] | None:
        """The map in front of each classifier, and the logits before they are resized."""
        ours, theirs = (known_taps(model) or (LAST_MAP, SCORES) for model in (student, teacher))
        return dict(zip(ours, theirs, strict=True))

    def sample(self, batch: Batch) -> Batch:
        """The batch at the size of a training view."""
        size = self.data.image_shape[1], self.data.image_shape[2]
        images = _same_size(batch.images, size, 0)
        return batch._replace(images=images, targets=_same_size(batch.targets, size, VOID))

    def run(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output for padded pictures."""
        return model(self._padded(batch.images, 0))

    def train(self, student: nn.Module, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        """The student's output, and the cross-entropy of its logits and of those of an auxiliary head."""
        output = self.run(student, batch)
        return output, self.loss(output, batch)

    def loss(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy over pixels that have a class; 0 where none has one."""
        if batch.targets is None:
            return {}
        targets = self._padded(batch.targets, VOID)
        if self.data.unlabelled is not None:
            targets = targets.masked_fill(targets == UNLABELLED, VOID)
        losses = {"cross_entropy": _cross_entropy(class_scores(output), targets)}
        auxiliary = output.get("aux") if isinstance(output, Mapping) else None
        if auxiliary is not None:
            losses["auxiliary"] = AUXILIARY * _cross_entropy(auxiliary, targets)
        return losses

    def predict(self, model: nn.Module, batch: Batch) -> Tensor | list[Tensor]:
        """Scores `(B, K, H, W)` at the size of the pictures; where sizes differ, a list of `(K, H, W)`.

        They are logits, or mean probabilities where several views of a picture are averaged.
        """
        if isinstance(batch.images, list):
            return [self._predict(model, image[None])[0] for image in batch.images]
        return self._predict(model, batch.images)

    def _predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """Scores of pictures `(B, C, H, W)`, over all the views that evaluation asks for."""
        if self.scales == (1.0,) and not self.flip:
            return self._slide(model, images)
        size, total = images.shape[-2:], torch.zeros((), device=images.device)
        for scale in self.scales:
            view = images if scale == 1 else _scaled(images, scale)
            for mirrored in (False, True)[: 1 + self.flip]:
                scores = self._slide(model, view.flip(-1) if mirrored else view).softmax(1)
                total = total + _resized(scores.flip(-1) if mirrored else scores, size)
        return total / (len(self.scales) * (1 + self.flip))

    def _slide(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits `(B, K, H, W)`, averaged over windows where the pictures are larger than one."""
        height, width = images.shape[-2:]
        high, wide = self.window or (height, width)
        if height <= high and width <= wide:
            return self._once(model, images)
        total = images.new_zeros(len(images), self.num_classes, height, width)
        count = images.new_zeros(height, width)
        for top in _starts(height, high):
            for left in _starts(width, wide):
                place = (..., slice(top, top + high), slice(left, left + wide))
                total[place] += self._once(model, images[place])
                count[place] += 1
        return total / count

    def _once(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits of one view, padded to what the model itself needs and cut back."""
        size = images.shape[-2:]
        padded = pad_to(images, _multiple_of(size, needed_multiple(model)))
        logits = _resized(class_scores(model(padded)), padded.shape[-2:])
        return logits[..., : size[0], : size[1]]

    def metrics(self) -> MetricCollection:
        """mIoU, pixel accuracy, the IoU of every class, the confusion matrix; Boundary IoU if asked for."""
        found: dict[str, Metric] = {"confusion": Confusion(self.num_classes)}
        if self.boundary_ratio is not None:
            found["boundary"] = BoundaryIoU(self.num_classes, self.boundary_ratio, VOID)
        return MetricCollection(found, compute_groups=False)  # type: ignore[arg-type]

    def update(self, metrics: MetricCollection, output: Any, batch: Batch) -> None:
        """Counts the pixels of one batch in."""
        answers, targets = self.answers(output), batch.targets
        for ours, truth in zip(answers, targets, strict=True):
            metrics.update(ours, truth)

    def answers(self, output: Any) -> Any:
        """The classes with the highest scores, `(B, H, W)`, or a list of `(H, W)`."""
        if isinstance(output, list):
            return [scores.argmax(0) for scores in output]
        return output.argmax(1)

    @property
    def chance(self) -> float | None:
        """About what one class everywhere scores."""
        return 1 / (2 * self.num_classes)

    def check_output(self, output: Any, model: str) -> None:
        """Raises UserError unless the scores are of the data's K classes."""
        classes = output[0].shape[0]
        if classes != self.num_classes:
            raise UserError(
                f"{model} has {classes} classes, the data has {self.num_classes}; "
                "build it with as many classes, or bring weights made for this data"
            )

    def _padded(self, pictures: Any, fill: float) -> Any:
        """Pictures or masks at a size that every usual model takes; lists stacked."""
        if isinstance(pictures, list):
            most = [max(p.shape[axis] for p in pictures) for axis in (-2, -1)]
            pictures = _same_size(pictures, (most[0], most[1]), fill)
        return pad_to(pictures, _multiple_of(pictures.shape[-2:], self.multiple), fill)


class Confusion(Metric):
    """The confusion matrix over a whole data set, and what follows from it.

    Args:
        num_classes: K.

    >>> metric = Confusion(3)
    >>> metric.update(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 255]]))
    >>> {name: value.tolist() for name, value in metric.compute().items()}["iou"]
    [0.5, 0.5, nan]
    """

    full_state_update = False
    confusion: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("confusion", torch.zeros(num_classes, num_classes).long(), dist_reduce_fx="sum")

    def update(self, answers: Tensor, truth: Tensor) -> None:
        """Counts pixels in.

        Args:
            answers: classes, integers of any shape.
            truth: the same shape; 255 does not count.
        """
        there = truth != VOID
        places = truth[there].long() * self.num_classes + answers[there]
        counts = torch.bincount(places, minlength=self.num_classes**2)
        self.confusion += counts.view(self.num_classes, self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """Figures of 0 to 1, and `confusion` `(K, K)` in pixels: rows are the truth, columns the answers.

        `iou` `(K,)` is NaN where a class is in neither; `miou` leaves those out.
        """
        right = self.confusion.diagonal().double()
        union = self.confusion.sum(0) + self.confusion.sum(1) - right
        iou = right / union  # 0 / 0 where the class is nowhere
        return {
            "miou": iou[union > 0].mean() if bool((union > 0).any()) else iou.new_zeros(()),
            "pixel_accuracy": right.sum() / self.confusion.sum().clamp(min=1),
            "iou": iou,
            "confusion": self.confusion,
        }


def class_scores(output: Any) -> Tensor:
    """The logits `(B, K, h, w)` in a model's output: itself, its `out` or `logits`, or its first entry.

    Raises:
        UserError: there are none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("out", output.get("logits"))
    elif isinstance(output, list | tuple) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.dim() != 4:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise UserError(f"a model gives {shape}, segmentation needs logits (B, K, H, W), 'out' or 'logits'")
    return found


def known_taps(model: nn.Module) -> tuple[str, str] | None:
    """The last map in front of the classifier and the logits of models of known libraries; else None."""
    layers = dict(model.named_modules())
    if {"encoder", "decoder", "segmentation_head.0"} <= layers.keys():
        return "decoder", "segmentation_head.0"
    if {"backbone", "classifier.cbr"} <= layers.keys():  # LR-ASPP
        return "classifier.cbr", "classifier"
    if "backbone" in layers and isinstance(head := layers.get("classifier"), nn.Sequential):
        kept = [i for i, layer in enumerate(list(head)[:-1]) if not isinstance(layer, nn.Dropout)]
        return f"classifier.{kept[-1]}", "classifier"
    if _MASK_FEATURES in layers:
        return _MASK_FEATURES, ""
    if {"neck", "head.head.4"} <= layers.keys():  # transformers' DPT resizes its logits in the same list
        return "head.head.2", SCORES
    if {"segmentation_head.aspp", "segmentation_head.classifier"} <= layers.keys():
        return "segmentation_head.aspp", SCORES
    if "decode_head.classifier" in layers:
        inner = next((n for n in ("decode_head.activation", "decode_head.fpn_bottleneck") if n in layers), "")
        return (inner, "decode_head.classifier") if inner else None
    return None


def needed_multiple(model: nn.Module) -> int:
    """Of pixels, that a model needs its pictures' sides to be; 1 where it does not say."""
    if not getattr(model, "requires_divisible_input_shape", False):
        return 1
    return int(getattr(getattr(model, "encoder", None), "output_stride", 1))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    scores = _resized(logits.float(), targets.shape[-2:])
    total = F.cross_entropy(scores, targets.long(), ignore_index=VOID, reduction="sum")
    return total / (targets != VOID).sum().clamp(min=1)


def _resized(logits: Tensor, size: Any) -> Tensor:
    return logits if logits.shape[-2:] == size else F.interpolate(logits, size, mode="bilinear")


def _scaled(images: Tensor, factor: float) -> Tensor:
    """Pictures at another size, as training views are resized."""
    size = [max(round(side * factor), 1) for side in images.shape[-2:]]
    # of the sizes, not of the factor: pixels must not shift where it does not divide the sides
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _multiple_of(size: Any, multiple: int) -> tuple[int, int]:
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin that cover a length and overlap by a third at least, the last at the end.

    >>> _starts(10, 6), _starts(5, 6)
    ([0, 4], [0])
    """
    last = max(length - window, 0)
    return [*range(0, last, max(window * 2 // 3, 1)), last]


def _same_size(pictures: Any, size: tuple[int, int], fill: float) -> Any:
    """Pictures or masks, stacked or a list, cut or padded to one size; None stays None."""
    if pictures is None:
        return None
    return torch.stack([pad_to(p[..., : size[0], : size[1]], size, fill) for p in pictures])
