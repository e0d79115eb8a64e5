"""What models give: a tensor, or lists, dicts and objects that hold several."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

Key = str | int


def entries_of(output: Any) -> dict[Key, Tensor]:
    """The tensors that a list, tuple, dict, named tuple, dataclass or other object holds, by key or name.

    >>> import torch
    >>> list(entries_of({"out": torch.zeros(1), "names": ["a"]}))
    ['out']
    """
    return {key: value for key, value in _items(output) if isinstance(value, Tensor)}


def class_scores(output: Any) -> tuple[Any, list[Tensor]]:
    """The class scores `(B, K)` of a classifier's output, and those of its auxiliary heads.

    Scores are the output itself, its entry `logits` or `out`, the first of a tuple or list, or the only
    tensor in it where that is `(B, K)`. Auxiliary heads are entries named `aux...` beside it, or in a plain
    tuple all further tensors of the scores' shape.

    Returns:
        The scores, or the output as it is where it has none; the auxiliary heads', in their order.

    >>> import torch
    >>> main, heads = class_scores((torch.zeros(2, 5), torch.ones(2, 5), torch.ones(2, 64)))
    >>> main.sum().item(), len(heads)
    (0.0, 1)
    """
    if isinstance(output, Tensor):
        return output, []
    entries = entries_of(output)
    named = next((key for key in ("logits", "out") if key in entries), None)
    if named is not None:
        main = entries.pop(named)
        return main, [value for key, value in entries.items() if str(key).startswith("aux")]
    if isinstance(output, list | tuple) and output and isinstance(output[0], Tensor):
        main, *others = entries.values()
        return main, [value for value in others if value.shape == main.shape]
    if len(entries) == 1 and (only := next(iter(entries.values()))).dim() == 2:
        return only, []
    return output, []


def are_probabilities(scores: Tensor) -> bool:
    """Whether class scores `(B, K, ...)` are shares of 1, as a softmax gives them.

    >>> import torch
    >>> are_probabilities(torch.rand(2, 5).softmax(1)), are_probabilities(torch.rand(2, 5))
    (True, False)
    """
    sums = scores.float().sum(1) if scores.dim() > 1 else scores.float()
    whole = scores.dim() > 1 and scores.shape[1] > 1 and not scores.is_complex()
    return bool(whole and (scores >= 0).all() and ((sums - 1).abs() < 1e-3).all())


def entry(output: Any, key: Key | None) -> Tensor:
    """One of them; `key` None is the output itself, or its class scores."""
    if key is None:  # of a model that gives more in training than in the dry run, what it gave there
        return class_scores(output)[0]  # type: ignore[no-any-return]
    if isinstance(key, str) and not isinstance(output, Mapping):
        return getattr(output, key)  # type: ignore[no-any-return]
    return output[key]  # type: ignore[no-any-return]


def _items(output: Any) -> Iterable[tuple[Key, Any]]:
    if isinstance(output, Mapping):
        return output.items()
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return zip(output._fields, output, strict=True)
    if isinstance(output, list | tuple):
        return enumerate(output)
    if dataclasses.is_dataclass(output):
        return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    return vars(output).items() if hasattr(output, "__dict__") else ()
