"""Weights from a file into a model, with an account of what matched."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffkd.errors import UserError
from diffkd.models.tensors import read_tensors

PREFIXES = ("module.", "model.", "_orig_mod.", "student.", "backbone.", "net.", "encoder.")
# Where checkpoints keep their tensors; averaged ones come first, for they are what their makers evaluate.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
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
    found, auxiliary = _without_auxiliary(_strip(dict(tensors), model), wanted)
    ordered = _in_order(found, wanted)
    if by_order:
        if ordered is None:
            raise UserError(f"'{source}' does not fit {name}: its order or shapes differ, too")
        found = ordered
    head = _other_head(found, wanted, num_classes)
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
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
    note += "; taken by their order" if by_order else ""
    note += f"; auxiliary heads left out ({', '.join(auxiliary)})" if auxiliary else ""
    return Loaded(note, bool(head))


def _other_head(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], num_classes: int | None
) -> list[str]:
    """Keys of a classifier of another size: all else alike, and as many outputs as there are classes.

    A detector has so many of its classes and the ground, for every anchor and every side of a box.
    """
    keys = [k for k in found if k in wanted and found[k].shape != wanted[k].shape]
    if num_classes is None or any(
        not wanted[k].dim() or found[k].shape[1:] != wanted[k].shape[1:] for k in keys
    ):
        return []
    sizes = {(len(found[k]), len(wanted[k])) for k in keys}
    if len(sizes) == 1 and all(ours == num_classes for _, ours in sizes):
        return keys
    ground = num_classes + 1
    whole = all(ours % ground == 0 for _, ours in sizes)
    classes = {Fraction(theirs * ground, ours) for theirs, ours in sizes}
    return keys if whole and len(classes) == 1 and min(classes).denominator == 1 else []


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
    for inside in (source / "student" / "model.safetensors", source / "model.safetensors"):
        if inside.is_file():
            return inside
    if not source.is_file():
        raise UserError(f"no weights file '{source}'")
    return source


def description(source: str | Path) -> dict[str, Any]:
    """What the `config.json` of a student that was trained here says of it; empty where there is none."""
    place = weights_file(source).with_name("config.json")
    try:
        found = json.loads(place.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "image_shape" in found else {}


def told_classes(source: str | Path) -> tuple[str, ...]:
    """Names of the classes in their order, as weights' own description says; empty where there is none.

    That is the `config.json` beside them (of a student trained here, of timm or of transformers), or the
    entry `class_names` of a `.safetensors` file's metadata, a list in JSON.
    """
    try:
        place = weights_file(source)
        told = json.loads(place.with_name("config.json").read_text())
    except (OSError, ValueError, UserError):
        told = {}
    if isinstance(told, dict):
        published = told.get("pretrained_cfg")
        inner = published if isinstance(published, dict) else {}
        labels = told.get("id2label")
        for names in (told.get("class_names"), told.get("label_names"), inner.get("label_names")):
            if isinstance(names, list) and names:
                return tuple(map(str, names))
        if isinstance(labels, dict) and labels and all(str(key).isdecimal() for key in labels):
            return tuple(str(labels[key]) for key in sorted(labels, key=int))
    return _in_metadata(Path(source))


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
    while isinstance(content, dict) and (
        nest := next((k for k in NESTS if isinstance(content.get(k), dict) and content[k]), "")
    ):
        content = content[nest]
        said += f" ('{nest}', averaged weights)" if nest in AVERAGED else ""
    found = content if isinstance(content, dict) else {}
    tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    tensors.pop("n_averaged", None)
    if not tensors:
        known = f" (it has: {', '.join(map(str, list(found)[:5]))})" if found else ""
        raise UserError(f"'{place}' holds no weights{known}")
    odd = next(
        (k for k, v in tensors.items() if v.is_meta or v.is_quantized or v.layout != torch.strided), None
    )
    if odd is not None:
        raise UserError(f"'{place}': '{odd}' is no plain tensor (quantised, sparse or empty); save it as one")
    nan = next((k for k, v in tensors.items() if v.is_floating_point() and v.isnan().any()), None)
    if nan is not None:
        raise UserError(f"'{place}': '{nan}' holds nan: the training that wrote it had failed")
    ours = {k.removeprefix(_STUDENT): v for k, v in tensors.items() if k.startswith(_STUDENT)}
    return (ours, f"{said} (the student in it)") if ours else (tensors, said)


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
    found = {_flat(key): value for key, value in _strip(read_weights(source)[0], body).items()}
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


def _strip(found: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Without prefixes that all keys share and the model's do not, or without which more keys fit."""
    wanted = set(model.state_dict())
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            bare = {k.removeprefix(prefix): v for k, v in found.items()}
            shared = all(k.startswith(prefix) for k in found) and not any(
                k.startswith(prefix) for k in wanted
            )
            if shared or len(wanted & bare.keys()) > len(wanted & found.keys()):
                found, stripped = bare, True
    return found


def _without_auxiliary(
    found: dict[str, Tensor], wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Without heads that only help to train, where the model was built without them; and their names."""
    extra = sorted({_part(k) for k in found if k not in wanted})
    heads = [
        name
        for name in extra
        if _AUXILIARY.fullmatch(name) and not any(k.startswith(f"{name}.") for k in wanted)
    ]
    return {k: v for k, v in found.items() if _part(k) not in heads}, heads


def _part(key: str) -> str:
    """The part of a model that a weight belongs to; of a detector's heads for regions, which one."""
    first, _, rest = key.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "roi_heads" else first


_AUXILIARY = re.compile(
    r"aux\d*|aux_?logits\d*|aux(iliary)?_?(head|classifier|output)s?\d*|roi_heads\.mask_(head|predictor)",
    re.IGNORECASE,
)


def _in_order(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors under the model's names, where order and shapes agree; None where they do not."""
    ours = {k: v for k, v in wanted.items() if not k.endswith("num_batches_tracked")}
    theirs = [v for k, v in found.items() if not k.endswith("num_batches_tracked")]
    if [v.shape for v in ours.values()] != [v.shape for v in theirs]:
        return None
    return dict(zip(ours, theirs, strict=True))
