"""Where a model's weights come from: a file, a run, whoever published them, or nowhere."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffkd.errors import UserError
from diffkd.models.base import published_state
from diffkd.models.weights import description, is_local, read_weights

AVAILABLE = "available"  # published weights where they can be fetched


@dataclass
class Weights:
    """Weights found for a model, before there is the model.

    Attributes:
        state: tensors by name; empty for fresh weights.
        source: what the account of them says.
        published: their name, if they are published ones.
        told: what their description says of pictures.
    """

    state: Mapping[str, Tensor] = field(default_factory=dict)
    source: str = ""
    published: str | None = None
    told: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_weights(model: str, wanted: str | None) -> Weights:
    """The weights that a recipe wants for a model, not loaded into it yet.

    Args:
        model: its name.
        wanted: a file, a run folder, the name of published weights, `available`; None for fresh ones.

    Raises:
        UserError: they cannot be read or fetched.
    """
    if wanted is None:
        return Weights()
    if is_local(wanted):
        state, source = read_weights(wanted)
        return Weights(state, source, told=description(wanted))
    name = "pretrained" if wanted == AVAILABLE else wanted
    try:
        return Weights(published_state(model, name), name, published=name)
    except UserError as error:
        if wanted != AVAILABLE:
            raise
        return Weights(notes=[f"fresh weights: {error}"])
