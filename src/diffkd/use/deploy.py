"""What of a student is exported, and how its answers are compared."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.assembly import Parts
from diffkd.batch import Batch, Frame
from diffkd.errors import UserError
from diffkd.features.outputs import class_scores
from diffkd.models.base import Preprocess
from diffkd.tasks.base import Task
from diffkd.tasks.detection import Detection
from diffkd.use.runtime import Answers, Runtime
from diffkd.use.student import Student

_SURE = 0.3  # least score of a box that counts as an answer


class Scorer(nn.Module):
    """A student with its normalisation in front of it on request, and one tensor behind it.

    Args:
        student: of a run.
        with_preparation: takes uint8 `(B, C, H, W)` and normalises; else takes normalised pictures.
    """

    def __init__(self, student: Student, with_preparation: bool) -> None:
        super().__init__()
        self.model = student.model
        self.preparation = student.prepare if with_preparation else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Class scores of pictures: `(B, K)`, or `(B, K, h, w)` of every position."""
        output = self.model(self.preparation(images))
        output = output["out"] if isinstance(output, Mapping) and "out" in output else output
        output = class_scores(output)[0]
        if not isinstance(output, Tensor):
            raise UserError(
                f"the model gives {type(output).__name__}, not class scores: "
                "only its weights can be exported, to=safetensors"
            )
        return output


class Detector(nn.Module):
    """A detector with its postprocessing, for one picture of one size.

    Padding at the bottom and the right is zero in front of the detector, as in training. With preparation,
    rows and columns there that are black throughout are taken for padding.

    Args:
        student: of a run.
        with_preparation: as in `Scorer`.
        size: `(H, W)` of the picture.
    """

    def __init__(self, student: Student, with_preparation: bool, size: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.size = student.model, size
        self.preparation = student.prepare if with_preparation else nn.Identity()
        self._task = (student.task,)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a picture `(1, C, H, W)` boxes `(n, 4)`, scores `(n,)` and labels `(n,)` from 0."""
        prepared = self.preparation(images)
        if not isinstance(self.preparation, nn.Identity):
            prepared = prepared.masked_fill(~_within(images), 0)
        batch = Batch(prepared, frames=(Frame(self.size, self.size),))
        (found,) = self._task[0].predict(self.model, batch)
        return found["boxes"], found["scores"], found["labels"]


def _within(images: Tensor) -> Tensor:
    """Where a picture `(1, C, H, W)` lies in its black padding at the bottom and the right: `(1, 1, H, W)`.

    >>> _within(torch.tensor([[[[0, 7, 0], [0, 0, 0]]]])).int().tolist()
    [[[[1, 1, 0], [0, 0, 0]]]]
    """
    light = images.float().amax(1, keepdim=True)
    rows, columns = light.amax(3, keepdim=True), light.amax(2, keepdim=True)
    return (rows.flip(2).cumsum(2).flip(2) > 0) & (columns.flip(3).cumsum(3).flip(3) > 0)


def deployed(student: Student, with_preparation: bool, images: Tensor) -> Scorer | Detector:
    """What is exported of a student.

    Args:
        student: of a run.
        with_preparation: takes uint8 pictures.
        images: `(B, C, H, W)` as it will take them.
    """
    if isinstance(student.task, Detection):
        return Detector(student, with_preparation, (images.shape[2], images.shape[3])).eval()
    return Scorer(student, with_preparation).eval()


def examples(student: Student, parts: Parts | None, raw: bool) -> Tensor:
    """A few pictures `(B, C, H, W)` as the exported model takes them: `raw` uint8, or normalised."""
    if parts is not None:
        batch = parts.sample(8)
    else:
        shape = student.config.get("input_shape") or student.config["image_shape"]
        batch = Batch(torch.randint(0, 256, (8, *shape), dtype=torch.uint8))
    if isinstance(student.task, Detection):
        batch = student.task.frame(batch)
    elif isinstance(batch.images, list):
        batch = Batch(torch.stack([batch.images[0]]))
    images = batch.images
    assert isinstance(images, Tensor)
    if raw:
        return images if not images.is_floating_point() else (images * 255).round().to(torch.uint8)
    prepared: Tensor = student.task.prepare(batch, student.prepare).images  # type: ignore[assignment]
    return prepared


class Distance(NamedTuple):
    """How far a file's answers are from the module's.

    Attributes:
        far: of scores, and of boxes as shares of the picture; infinite where there are more or fewer.
        boxes: how many were compared, the sure ones where a picture has some; None of models without.
    """

    far: float
    boxes: int | None


@torch.no_grad()
def distance(module: nn.Module, runtime: Runtime, images: Tensor) -> Distance:
    """How far a file's answers for pictures `(B, C, H, W)` are from the module's."""
    detects, worst, boxes = isinstance(module, Detector), 0.0, 0
    for some in torch.split(images, 1) if detects else [images]:
        ours, theirs = _several(module(some)), _several(runtime(some))
        if detects:  # the boxes that count; whether one of the others is kept may hang on the last digit
            count = int((ours[1] >= _SURE).sum()) or len(ours[1])
            ours, theirs = ([part[:count] for part in answer] for answer in (ours, theirs))
        if [part.shape for part in ours] != [part.shape for part in theirs]:
            return Distance(float("inf"), None)
        boxes += len(ours[0])
        scales = [max(some.shape[2:]), 1, 1] if detects else [1]
        for a, b, scale in zip(ours, theirs, scales, strict=True):
            if a.numel():
                far = float((a.double() - b.double()).abs().max()) / scale
                worst = far if far > worst or far != far else worst
    return Distance(worst, boxes if detects else None)


def _several(answers: Answers) -> list[Tensor]:
    return [answers] if isinstance(answers, Tensor) else list(answers)


class Standing(nn.Module):
    """An exported file in the model's place, for the task to evaluate.

    Args:
        run: the file as a function.
        task: of the student.
        undo: of a file that normalises by itself, the normalisation that the task's pictures have had: tasks
            that pad and cut pictures do so with normalised ones.
        channels: that such a file takes.
    """

    def __init__(
        self, run: Runtime, task: Task, undo: Preprocess | None = None, channels: int | None = None
    ) -> None:
        super().__init__()
        self._undo, self._channels = (undo,), channels
        self._run = (run,)  # as a module it would be asked to train
        self._detects = isinstance(task, Detection)
        self._size: tuple[int, int] | None = getattr(run, "size", None)

    def forward(self, images: Any) -> Any:
        """Class scores of pictures, or torchvision's answers of a detector, labels from 1."""
        if self._undo[0] is not None:
            images = self._raw(images, self._undo[0])
        if not self._detects:
            return self._run[0](images)
        return [self._boxes(image[None]) for image in images]

    def _raw(self, images: Tensor, prepare: Preprocess) -> Tensor:
        """Normalised pictures as the uint8 that they came of; what was zero becomes the mean colour."""
        raw = ((images * prepare.std + prepare.mean) * 255).round().clamp(0, 255).to(torch.uint8)
        count = self._channels or raw.shape[1]
        return raw[:, :count] if count <= raw.shape[1] else raw.expand(-1, count, -1, -1)

    def _boxes(self, image: Tensor) -> dict[str, Tensor]:
        if self._size is not None:
            down, across = (want - has for want, has in zip(self._size, image.shape[2:], strict=True))
            if min(down, across) < 0:
                raise UserError(
                    "verify=full: the exported detector takes pictures of {}x{}, ".format(*self._size)
                    + "and there are larger ones; leave it out: some pictures are compared all the same"
                )
            image = F.pad(image, (0, across, 0, down))
        boxes, scores, labels = self._run[0](image)
        return {"boxes": boxes, "scores": scores, "labels": labels.long() + 1}
