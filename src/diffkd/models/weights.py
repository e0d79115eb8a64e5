"""Weights from a file into a model, with an account of what matched."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffkd.errors import UserError
from diffkd.models.matching import (
    bare,
    in_order,
    lacking_head,
    other_head,
    several_way,
    without_auxiliary,
)
from diffkd.models.tensors import read_tensors

# Where checkpoints keep their tensors; averaged ones come first, for they are what their makers evaluate.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "params_ema", "ema")
NESTS = (*AVERAGED, "state_dict", "model", "model_state_dict", "net", "module")


@dataclass(frozen=True)
class Loaded:
    """What became of a file of weights.

    Attributes:
        note: one line that says what matched.
        fresh_head: the classifier is for another number of classes and stayed as it was.
    """

    note: str
    fresh_head: bool = False


def load_weights(
    model: nn.Module, source: str | Path, *, name: str, num_classes: int | None = None
) -> Loaded:
    """Loads a file's weights and says what matched. On an error the model is unchanged.

    Args:
        model: takes the weights.
        source: `.safetensors`, or a PyTorch file (`weights_only`), or a run folder.
        name: what errors call the model.
        num_classes: a classifier of so many classes stays fresh where the file's has another number;
            None refuses such a file.

    Raises:
        UserError: the file cannot be read, may run code, or does not fit.
    """
    tensors, said = read_weights(source)
    return load_state(model, tensors, said, name=name, num_classes=num_classes)


def load_state(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    name: str,
    num_classes: int | None = None,
    by_order: bool = False,
) -> Loaded:
    """As `load_weights`, for tensors at hand.

    Args:
        model: takes the weights.
        tensors: by name.
        source: what the account calls them.
        name: what errors call the model.
        num_classes: see `load_weights`.
        by_order: takes them in their order, whatever their names.
    """
    wanted = model.state_dict()
    found, others = bare(dict(tensors), wanted, source)
    found, auxiliary = without_auxiliary(found, wanted)
    ordered = in_order(found, wanted) or in_order(tensors, wanted)
    if by_order:
        if ordered is None:
            raise UserError(f"'{source}' does not fit {name}: its order or shapes differ, too")
        found = ordered
    head = other_head(found, wanted, num_classes)
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    # a classifier of another name may be in it
    lacks = lacking_head(missing, wanted, num_classes) and ordered is None
    bodiless = missing if lacks and not head else []
    missing = [] if bodiless else missing
    unexpected = [k for k in found if k not in wanted]
    shapes = [k for k in found if k in wanted and k not in head and found[k].shape != wanted[k].shape]
    coarse = next((k for k in found if k in wanted and _coarser(found[k], wanted[k])), None)
    if coarse is not None:
        kind = str(found[coarse].dtype).removeprefix("torch.")
        raise UserError(f"'{source}' does not fit {name}: '{coarse}' is {kind}; save it as float32 or half")
    if missing or unexpected or shapes:
        hint = "; order and shapes agree: weights_by_order=true takes them so" if ordered is not None else ""
        raise UserError(f"'{source}' does not fit {name}: {_misfit(missing, unexpected, shapes)}{hint}")
    model.load_state_dict({k: v for k, v in found.items() if k not in head}, strict=False)
    note = f"{source}: {len(found) - len(head)} of {len(wanted)} tensors"
    if head:
        theirs, ours = len(found[head[0]]), len(wanted[head[0]])
        said = f"{num_classes} instead of {theirs}" if ours == num_classes else f"{num_classes}"
        note += f"; fresh head ({', '.join(head)}) for {said} classes"
    if bodiless:
        note += f"; no head in it: a fresh one ({', '.join(bodiless)}) for {num_classes} classes"
    note += "; taken by their order" if by_order else ""
    note += f"; auxiliary heads left out ({', '.join(auxiliary)})" if auxiliary else ""
    note += f"; what else is in it left out ({', '.join(others[:5])})" if others else ""
    return Loaded(note, bool(head or bodiless))


def _coarser(theirs: Tensor, ours: Tensor) -> bool:
    """Whether numbers would lose their meaning as ours: whole, of 8 bits or complex for plain floats."""
    fine = theirs.is_floating_point() and theirs.element_size() > 1
    return ours.is_floating_point() and not fine


def _misfit(missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    parts = []
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if keys:
            parts.append(f"{len(keys)} keys {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
    return "; ".join(parts)


def is_local(source: str) -> bool:
    """Whether `weights` means a place on disk, and not the name of published weights."""
    return Path(source).exists() or "/" in source or Path(source).suffix in _ENDINGS


_ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar")


def weights_file(source: str | Path) -> Path:
    """The file that a path means: itself, or the student of a run folder.

    Raises:
        UserError: there is none.
    """
    source = Path(source)
    names = ("student/model.safetensors", "model.safetensors", "pytorch_model.bin")
    for inside in (source / name for name in names):
        if inside.is_file():
            return inside
    if (index := source / "model.safetensors.index.json").is_file():
        raise UserError(f"'{index}' lists weights in several files; save them as one")
    if not source.is_file():
        raise UserError(f"no weights file '{source}'")
    return source


def description(source: str | Path) -> dict[str, Any]:
    """What the `config.json` of a student that was trained here says of it; empty where there is none."""
    found = _config_of(source)
    return found if "image_shape" in found else {}


def _config_of(source: str | Path) -> dict[str, Any]:
    """The `config.json` beside weights; empty where there is none, or none that can be read."""
    place = weights_file(source).with_name("config.json")
    try:
        found = json.loads(place.read_text()) if place.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def told_classes(source: str | Path) -> tuple[str, ...]:
    """Names of the classes in their order, as weights' own description says; empty where there is none.

    That is the `config.json` beside them (of a student trained here, of timm or of transformers), the entry
    `class_names` of a `.safetensors` file's metadata, a list in JSON, or what a checkpoint of PyTorch says
    beside its weights: `classes`, `class_to_idx` or the like, in `meta` perhaps, as mmengine writes it.
    """
    try:
        told = _config_of(source)
    except UserError:  # of weights that are not there
        told = {}
    return _names_in(told) or _in_metadata(Path(source)) or _in_checkpoint(Path(source))


_NAMED = ("class_names", "label_names", "classes", "CLASSES", "categories", "names")
_NUMBERED = ("id2label", "idx_to_class", "names")  # number: name
_NUMBERS = ("class_to_idx", "label2id")  # name: number


def _names_in(told: Mapping[Any, Any]) -> tuple[str, ...]:
    """Names of classes in a description, or in a part of it."""
    for key in _NAMED:
        names = told.get(key)
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    pairs = [(k, v) for key in _NUMBERED if isinstance(part := told.get(key), dict) for k, v in part.items()]
    pairs = pairs or [
        (v, k) for key in _NUMBERS if isinstance(part := told.get(key), dict) for k, v in part.items()
    ]
    names = {int(number): str(name) for number, name in pairs if str(number).isdecimal()}
    if names and sorted(names) == list(range(len(pairs))):
        return tuple(names[i] for i in range(len(names)))
    inner = (told.get(key) for key in ("pretrained_cfg", "meta", "dataset_meta", "hyper_parameters", "args"))
    parts = (part if isinstance(part, dict) else getattr(part, "__dict__", None) for part in inner)
    return next((found for part in parts if part and (found := _names_in(part))), ())


def _in_checkpoint(place: Path) -> tuple[str, ...]:
    if place.suffix == ".safetensors" or not place.is_file():
        return ()
    try:
        content = read_tensors(place)
    except UserError:  # it will be named where its tensors are read
        return ()
    return _names_in(content) if isinstance(content, dict) else ()


def _in_metadata(place: Path) -> tuple[str, ...]:
    if place.suffix != ".safetensors" or not place.is_file():
        return ()
    try:
        with safe_open(place, framework="pt") as file:
            names = json.loads((file.metadata() or {}).get("class_names", "null"))
    except Exception:  # it will be named where its tensors are read
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def read_weights(source: str | Path) -> tuple[dict[str, Tensor], str]:
    """Tensors by name, and what an account of them calls them: the file, and whether they are averaged.

    Raises:
        UserError: the file cannot be read, may run code, or holds no tensors.
    """
    place = weights_file(source)
    content = read_tensors(place)
    said = place.name
    while isinstance(content, dict) and (nest := _nest(content)):
        content = content[nest]
        said += f" ('{nest}', averaged weights)" if nest in AVERAGED else ""
        said += f" ('{nest}')" if nest not in NESTS else ""
    found = content if isinstance(content, dict) else {}
    tensors = dict(_tensors(found))
    tensors.pop("n_averaged", None)
    if not tensors:
        known = f" (it has: {', '.join(map(str, list(found)[:5]))})" if found else ""
        several = [key for key, part in found.items() if isinstance(part, dict) and _holds(part)]
        way = several_way(place.name, f"x['{several[0]}']") if len(several) > 1 else ""
        raise UserError(f"'{place}' holds no weights{known}{way}")
    odd = next(
        (k for k, v in tensors.items() if v.is_meta or v.is_quantized or v.layout != torch.strided), None
    )
    if odd is not None:
        raise UserError(f"'{place}': '{odd}' is no plain tensor (quantised, sparse or empty); save it as one")
    fine = {k: v for k, v in tensors.items() if v.is_floating_point() and v.element_size() > 1}
    nan = next((k for k, v in fine.items() if v.isnan().any()), None)
    if nan is not None:
        raise UserError(f"'{place}': '{nan}' holds nan: the training that wrote it had failed")
    # minus infinity is what masks of attention hold
    inf = next((k for k, v in fine.items() if v.isposinf().any()), None)
    if inf is not None:
        raise UserError(f"'{place}': '{inf}' holds infinite values: the training that wrote it had failed")
    ours = {k.removeprefix(_STUDENT): v for k, v in tensors.items() if k.startswith(_STUDENT)}
    return (ours, f"{said} (the student in it)") if ours else (tensors, said)


def _nest(content: dict[Any, Any]) -> str:
    """The entry of a checkpoint that holds its weights; empty where it holds them itself, or several do."""
    known = next((k for k in NESTS if isinstance(content.get(k), dict) and content[k]), "")
    if known or any(True for _ in _tensors(content)):
        return known
    nests = [k for k, v in content.items() if isinstance(k, str) and isinstance(v, dict) and _holds(v)]
    return nests[0] if len(nests) == 1 else ""


def _holds(content: dict[Any, Any], deeper: int = 3) -> bool:
    """Whether there are tensors in an entry, or a few deeper."""
    if any(True for _ in _tensors(content)):
        return True
    # an optimizer numbers its tensors
    inner = (v for k, v in content.items() if isinstance(k, str) and isinstance(v, dict))
    return deeper > 0 and any(_holds(part, deeper - 1) for part in inner)


def _tensors(content: dict[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield str(key), value
        elif isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            yield str(key), torch.from_numpy(value)


_STUDENT = "distiller.student."  # in checkpoints of a run of this library


def load_backbone(body: nn.Module, source: str | Path, name: str) -> None:
    """A file's weights into the part of a model that looks at the picture; the file's classifier stays out.

    Dots and underscores in names are the same here: timm's feature extractors flatten their paths.

    Args:
        body: takes the weights.
        source: as for `load_weights`.
        name: what errors call the backbone.

    Raises:
        UserError: the file cannot be read, or lacks some of the weights.
    """
    ours = body.state_dict()
    bared, _ = bare(read_weights(source)[0], ours, str(source))
    found = {_flat(key): value for key, value in bared.items()}
    fits = {
        key: found[_flat(key)]
        for key, value in ours.items()
        if _flat(key) in found and found[_flat(key)].shape == value.shape
    }
    missing = [key for key in ours if key not in fits and not key.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"backbone '{name}': '{source}' lacks {len(missing)} of its {len(ours)} tensors, such as "
            f"'{missing[0]}'"
        )
    body.load_state_dict(fits, strict=False)


def _flat(key: str) -> str:
    return key.removeprefix("model.").replace(".", "_")
