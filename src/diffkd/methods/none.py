"""No distillation: the student learns from the labels alone."""

from collections.abc import Mapping

from torch import Tensor

from diffkd.batch import Batch
from diffkd.methods.base import Method, Setup


class NoDistillation(Method):
    """The baseline of every comparison.

    Use it in every comparison: a method is worth what it adds to this.

    Args:
        setup: what the run taps; nothing of it is used.
    """

    stages, uses_logits = "none", False

    def __init__(self, setup: Setup) -> None:
        super().__init__()

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """No losses."""
        return {}
