"""How models are run in each of their roles."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from diffkd.batch import Batch

Run = Callable[[nn.Module, Batch], Any]


def call_model(model: nn.Module, batch: Batch) -> Any:
    """The usual forward pass: the model called with the batch's images, a dict as keywords."""
    images: Any = batch.images
    return model(**images) if isinstance(images, Mapping) else model(images)


class Roles(Protocol):
    """How models are run: what `diffkd.Task` says, and what a loop of one's own may say by `run` alone."""

    def prepare(self, batch: Batch, preprocess: Callable[[Any], Any]) -> Batch:
        """The batch as one model sees it."""
        ...

    def train(self, student: nn.Module, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        """The student's output, and its supervised losses."""
        ...

    def teach(self, teacher: nn.Module, batch: Batch) -> Any:
        """Runs a model as far as its taps go."""
        ...

    def frame(self, batch: Batch) -> Batch:
        """A loader's batch as both models see it, before each one's preparation."""
        ...

    def taps(self, student: nn.Module, teacher: nn.Module) -> dict[str, str] | None:
        """Default taps, of which some may be left to be found (`features.defaults`); None has all found."""
        ...


class Plain:
    """Models called the same way in every role, without losses of their own."""

    def __init__(self, run: Run) -> None:
        self.teach = run

    def prepare(self, batch: Batch, preprocess: Callable[[Any], Any]) -> Batch:
        """The images as the model wants them."""
        return batch._replace(images=preprocess(batch.images))

    def train(self, student: nn.Module, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        """The output alone."""
        return self.teach(student, batch), {}

    def frame(self, batch: Batch) -> Batch:
        """The batch as it came."""
        return batch

    def taps(self, student: nn.Module, teacher: nn.Module) -> dict[str, str] | None:
        """None: they are found."""
        return None
