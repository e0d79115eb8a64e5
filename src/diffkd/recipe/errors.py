"""Pydantic's errors as one line in a recipe's own words."""

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from diffkd.errors import kind_of, nearest

Models = list[type[BaseModel]]

# What pydantic calls the branches of a union that are no models.
_BRANCHES = ("int", "float", "str", "constrained-int", "constrained-float", "constrained-str")


def first_error(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """The error that helps most, an unknown key before any other, as `key: what is wrong`.

    Args:
        error: what pydantic raised.
        model: what it was validating.
        prefix: what comes before the keys of the model.
    """
    found = error.errors()
    errors = [e for e in found if not _is_word(e)] or found
    first = min(errors, key=lambda e: (e["type"] != "extra_forbidden", len(e["loc"])))
    shown, _ = _walk(model, first["loc"])
    _, above = _walk(model, first["loc"][:-1])
    known = sorted({key for m in above for key, field in m.model_fields.items() if not field.exclude})
    more = len({_walk(model, e["loc"])[0] for e in errors}) - 1
    elsewhere = _elsewhere(model, str(first["loc"][-1])) if first["type"] == "extra_forbidden" else None
    words = [e["ctx"]["expected"] for e in found if _is_word(e) and e["loc"][:-1] == first["loc"][:-1]]
    reason = _reason(first, known)
    if elsewhere and elsewhere != shown:
        reason = f"unknown key; did you mean '{elsewhere}'?"
    elif words and not _is_word(first):
        reason = reason.replace(", got ", f", or {words[0]}, got ")
    return f"{prefix}{shown}: {reason}" + (f" (and {more} more)" if more else "")


def _is_word(error: Any) -> bool:
    """Whether a value is none of the words that may stand in the place of a number or a list."""
    return error["type"] == "literal_error" and str(error["loc"][-1]).startswith("literal[")


# What people call keys of a recipe.
_CALLED = {
    **dict.fromkeys(("device", "gpu"), "trainer.accelerator"),
    **dict.fromkeys(("gpus", "num_gpus"), "trainer.devices"),
    **dict.fromkeys(("learning_rate", "base_lr"), "optimizer.lr"),
    **dict.fromkeys(("bs", "batch", "batchsize"), "data.batch_size"),
    **dict.fromkeys(("num_workers", "n_workers"), "data.workers"),
    **dict.fromkeys(("num_epochs", "max_epochs", "n_epochs"), "trainer.epochs"),
    **dict.fromkeys(("amp", "dtype"), "trainer.precision"),
    **dict.fromkeys(("grad_clip", "clip_grad", "gradient_clip"), "trainer.clip_grad_norm"),
    **dict.fromkeys(("wd", "decay"), "optimizer.weight_decay"),
    **dict.fromkeys(("data_dir", "dataset_path", "data_path"), "data.root"),
    **dict.fromkeys(("out", "output_dir", "out_dir", "save_dir"), "output"),
    **dict.fromkeys(("random_seed",), "seed"),
    **dict.fromkeys(("pretrained", "checkpoint"), "student.weights"),
    **{f"{side}_{key}": f"{side}.{key}" for side in ("teacher", "student") for key in ("weights", "model")},
    **dict.fromkeys(("image_size", "img_size", "input_size", "imgsz"), "data.image_size"),
    **{key: f"data.{key}" for key in ("augment", "num_classes", "classes", "crop_size", "max_corrupt")},
    "label_smoothing": "task.label_smoothing",
    "temperature": "method.kd.temperature",
}


def _elsewhere(model: type[BaseModel], word: str) -> str | None:
    """The key that a word means which stands at another place: the nearest to the top of that name."""
    if "data" not in model.model_fields:  # options of one part only
        return None
    level: list[tuple[str, type[BaseModel]]] = [("", model)]
    while level:
        for prefix, kind in level:
            if prefix and word in kind.model_fields and word != "name":
                return f"{prefix}.{word}"
        level = [
            (f"{prefix}.{name}" if prefix else name, inner)
            for prefix, kind in level
            for name, field in kind.model_fields.items()
            if name != "method"
            for inner in _models_in(field.annotation)
        ]
    return _CALLED.get(word)


def _walk(model: type[BaseModel], place: Sequence[Any]) -> tuple[str, Models]:
    """A place as the user would write it, and the models that may stand there.

    Pydantic's places also name the branch of a union that it tried: these are left out.
    """
    shown: list[str] = []
    models: Models = [model]
    for part in place:
        chosen = [m for m in models if "name" in m.model_fields and m.model_fields["name"].default == part]
        if chosen and shown:
            models = chosen
            continue
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if not fields and isinstance(part, str) and (part in _BRANCHES or "[" in part):
            continue
        shown.append(str(part))
        inner = [found for field in fields for found in _models_in(field.annotation)]
        models = inner or models
    return ".".join(shown), models


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _reason(error: Any, known: list[str]) -> str:
    """What is wrong with the value at its place."""
    kind, got, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{nearest(str(error['loc'][-1]), known)}"
    if kind == "missing":
        return "is needed"
    if kind == "invalid_key":
        return f"keys are names, this is {kind_of(got)}"
    if kind == "union_tag_invalid":
        return f"unknown '{context['tag']}'{nearest(context['tag'], _quoted(context['expected_tags']))}"
    if kind == "literal_error":
        return f"unknown {got!r}{nearest(str(got), _quoted(context['expected']))}"
    for limit, words in _LIMITS.items():
        if limit in context:
            return f"{words} {context[limit]:g}, got {got!r}"
    if kind == "value_error":
        return str(context["error"])
    wanted = next((words for part, words in _TYPES.items() if kind.startswith(part)), error["msg"])
    return f"needs {wanted}, got {kind_of(got)}"


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


_LIMITS = {"ge": "needs at least", "gt": "needs more than", "le": "needs at most", "lt": "needs less than"}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "too_": "a list of another length",
    "dict": "a mapping of keys",
    "model": "a mapping of keys",
    "union_tag": "a mapping of keys",
}
