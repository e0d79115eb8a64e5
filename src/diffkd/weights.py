"""Weights from a file into a model, with an account of what matched."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffkd.errors import UserError

PREFIXES = ("module.", "model.", "_orig_mod.", "student.", "backbone.", "net.")
NESTS = ("state_dict", "model", "model_state_dict", "net", "module", "state_dict_ema", "model_ema", "ema")


def load_weights(model: nn.Module, source: str | Path, *, name: str, replace_head: bool = False) -> str:
    """Loads weights and says in one line what matched. On an error the model is unchanged.

    Args:
        model: takes the weights.
        source: `.safetensors`, or a PyTorch file (`weights_only`), or a run folder.
        name: what errors call the model.
        replace_head: a classifier of another size stays fresh, and that is said.

    Raises:
        UserError: the file cannot be read, may run code, or does not fit.
    """
    place = _place(Path(source))
    found = _strip(read_weights(place), model)
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in found if k not in wanted]
    shapes = [k for k in found if k in wanted and found[k].shape != wanted[k].shape]
    if missing or unexpected or shapes:
        raise UserError(f"'{place}' does not fit {name}: {_misfit(missing, unexpected, shapes)}")
    model.load_state_dict(found, strict=False)
    return f"{place.name}: {len(found)} of {len(wanted)} tensors"


def _misfit(missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    parts = []
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if keys:
            parts.append(f"{len(keys)} keys {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
    return "; ".join(parts)


def _place(source: Path) -> Path:
    for inside in (source / "student" / "model.safetensors", source / "model.safetensors"):
        if inside.is_file():
            return inside
    if not source.is_file():
        raise UserError(f"no weights file '{source}'")
    return source


def read_weights(place: Path) -> dict[str, Tensor]:
    """Tensors by name, out of whatever mapping they are nested in."""
    try:
        if place.suffix == ".safetensors":
            return load_file(place)
        content: Any = torch.load(place, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"'{place}' is not a plain weights file: it is a pickle that could run code, or damaged; "
            "convert it to safetensors where you trust it"
        ) from error
    except Exception as error:
        raise UserError(f"'{place}' cannot be read: {str(error).splitlines()[0]}") from error
    while isinstance(content, dict) and (
        nest := next((k for k in NESTS if isinstance(content.get(k), dict)), "")
    ):
        content = content[nest]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise UserError(f"'{place}' holds no weights")
    return tensors


def _strip(found: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Without a common prefix, where the keys then fit better."""
    wanted = set(model.state_dict())
    for prefix in PREFIXES * 2:
        bare = {k.removeprefix(prefix): v for k, v in found.items()}
        if len(wanted & bare.keys()) > len(wanted & found.keys()):
            found = bare
    return found
