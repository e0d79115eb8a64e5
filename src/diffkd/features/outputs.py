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


def entry(output: Any, key: Key | None) -> Tensor:
    """One of them; `key` None is the output itself."""
    if key is None:
        return output  # type: ignore[no-any-return]
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
