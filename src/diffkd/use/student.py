"""A trained student from its folder alone: model, preparation and task, wherever the folder lies."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from diffkd.batch import Batch
from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.models import base as models
from diffkd.models.weights import load_weights
from diffkd.names import is_path
from diffkd.pictures.decoding import decode
from diffkd.pictures.view import TestView
from diffkd.runs.disk import read_json
from diffkd.tasks.base import Task, task_class

_NEEDED = ("model", "task", "image_shape", "mean", "std")


@dataclass
class Student:
    """A trained model that knows how pictures are prepared for it and what its answers mean.

    Attributes:
        model: the plain module, in eval mode.
        prepare: the model's normalisation of `(B, C, H, W)` pictures, uint8 or 0 to 1.
        view: from an RGB picture to `(C, H, W)` uint8, as in evaluation.
        task: what its answers mean.
        class_names: in the order of the class indices; numbers where the data had no names.
        config: all that `config.json` says.
    """

    model: nn.Module
    prepare: models.Preprocess
    view: TestView
    task: Task
    class_names: tuple[str, ...]
    config: dict[str, Any] = field(repr=False)

    def to(self, device: torch.device | str) -> "Student":
        """Moves model and preparation to a device."""
        self.model.to(device)
        self.prepare.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def read(self, picture: str | Path | Image.Image) -> Tensor:
        """A picture as it is seen in evaluation, `(C, H, W)` uint8.

        Raises:
            UserError: it cannot be read.
        """
        source = Path(picture) if isinstance(picture, str) else picture
        return self.view(self.decoded(source, str(picture)))

    def decoded(self, picture: Path | Image.Image, name: str) -> Image.Image:
        """A picture as 8-bit RGB, as `decode` gives it for the data that the student was trained on."""
        return decode(picture, name, levels=self.view.levels)

    @torch.no_grad()
    def predict(self, images: Iterable[Tensor]) -> Any:
        """What the task's `predict` gives for pictures `(C, H, W)`, uint8 or floating point in 0 to 1."""
        listed = [image.to(self.device) for image in images]
        alike = len({image.shape for image in listed}) == 1
        batch = self.task.frame(Batch(torch.stack(listed) if alike else listed))
        return self.task.predict(self.model, self.task.prepare(batch, self.prepare))


def load_student(run: str | Path, *, trust: bool = False, which: Literal["last", "best"] = "last") -> Student:
    """The student of a run folder, or of its `student/` folder moved anywhere.

    Args:
        run: a run folder, or a folder with `model.safetensors` and `config.json`.
        trust: runs the code that the folder names, where its model or task is somebody's own.
        which: of a run folder's students that of the last epoch or of the best.

    Raises:
        UserError: there is no student, it is damaged, it was written by an older version, or it names
            code and is not trusted.
    """
    folder = student_folder(run, which)
    config = read_config(folder)
    code = [name for name in (config["model"], config["task"]) if is_path(str(name))]
    if code and not trust:
        raise UserError(
            f"'{folder / 'config.json'}': '{code[0]}' would run code; add trust=true if you trust it"
        )
    shape = tuple(config["image_shape"])
    names = tuple(config.get("class_names") or map(str, range(config["num_classes"] or 0)))
    channels, height, width = config.get("input_shape") or shape
    data = Data(
        _Nothing(),
        _Nothing(),
        config.get("num_classes"),
        (shape[0], shape[1], shape[2]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        class_names=names,
    )
    model = models.build(
        config["model"],
        num_classes=data.num_classes,
        image_shape=(channels, height, width),
        options=config.get("options"),
    )
    load_weights(model, folder / "model.safetensors", name=config["model"])
    models.tell_normalisation(model, data.mean, data.std)
    size = config.get("size")
    prepare = models.Preprocess(data.mean, data.std, tuple(size) if size else None, channels=channels)
    task = task_class(config["task"])(data, **config.get("task_options", {}))
    view = TestView.of(config["view"]) if "view" in config else _old_view(data, task)
    return Student(model.eval(), prepare, view, task, names, config)


def student_folder(run: str | Path, which: str = "last") -> Path:
    """The folder with the student's weights and their description.

    Args:
        run: a run folder, or that folder itself.
        which: of a run folder's, `last` or `best`.

    Raises:
        UserError: there is none.
    """
    if which not in ("last", "best"):
        raise UserError(f"which={which}: needs last or best")
    own = Path(run) / ("student" if which == "last" else "student-best")
    if which == "best" and (Path(run) / "student").is_dir() and not own.is_dir():
        raise UserError(f"'{run}' keeps no student of its best epoch")
    for folder in (own, Path(run)):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    raise UserError(
        f"'{run}' holds no student: neither student/config.json and student/model.safetensors, nor these"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """What a student's `config.json` says.

    Raises:
        UserError: it cannot be read, or lacks what is needed.
    """
    place = folder / "config.json"
    config = read_json(place)
    missing = [key for key in _NEEDED if key not in config]
    if missing:
        raise UserError(f"'{place}' does not say '{missing[0]}': it is no description of a student")
    return config


def _old_view(data: Data, task: Task) -> TestView:
    channels, height, width = data.image_shape
    if not task.resizes:
        return TestView("whole", channels=channels)
    return TestView("resize", (height, width), channels=channels)


class _Nothing:
    """A split without samples: a task that only predicts asks for none."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)
