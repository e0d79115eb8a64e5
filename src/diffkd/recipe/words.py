"""A command line's words as values: text where text is meant, whatever YAML would take it for."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from diffkd.errors import UserError
from diffkd.names import is_path, load_object
from diffkd.recipe.reading import parse, parse_texts

# What a section is called by; said in short, it is the section: `student=timm/resnet18`.
NAMED = {"task": "name", "data": "name", "optimizer": "name", "schedule": "name"}
NAMED |= {"teacher": "model", "student": "model"}
_SECTIONS = {*NAMED, "method"}
_TEXT = {"output", "data.root", "data.unlabelled", *(f"{section}.{name}" for section, name in NAMED.items())}
_TEXT |= {f"{side}.weights" for side in ("student", "teacher")}
_TEXT_OPTIONS = {"dataset", "subset", "train_split", "test_split", "test_folder", "augment"}
_TEXT_OPTIONS |= {"train_file", "test_file", "path_column", "image_column", "label_column"}
_TEXT_OPTIONS |= {
    *("train", "test", "train_images", "test_images", "images", "masks", "mask_suffix", "train_set"),
    *("image_ending", "label_ending", "label_field"),
}
_SHOWN = 80  # characters of a word in an error
_BY_LAYER = ("taps", "lr_factors")  # mappings from layers' paths
_TEXT_LISTS = {"data.classes", "data.class_order", "student.freeze", "teacher.freeze"}


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of `key=value`.

    Raises:
        UserError: it is none, or its value cannot be read.

    >>> parse_override("data.root=2024-11-25"), parse_override("seed=2024")
    (('data.root', '2024-11-25'), ('seed', 2024))
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"command line: '{override}' is not key=value")
    listed = text.lstrip()[:1] in ("[", "{")
    if key in _TEXT_LISTS and listed:
        return key, _read(key, text, parse_texts)
    if key in _TEXT_LISTS and "," in text and not Path(text).exists():  # shells want brackets quoted
        return key, [part.strip() for part in text.split(",")]
    if key == "data.class_weights" and "," in text and not listed:
        return key, _read(key, f"[{text}]", parse)
    section, _, rest = key.partition(".")
    further = section == "teachers" and rest.partition(".")[2] in ("", "model", "weights") and not listed
    if further or key in _TEXT | _TEXT_LISTS or (key.startswith("data.") and key[5:] in _TEXT_OPTIONS):
        return key, None if text in ("", "null") else text  # the words are the text
    value = _read(key, text, parse) if text else None
    return key, text if key in _SECTIONS and isinstance(value, bool) else value


def _read(key: str, text: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(text)
    except yaml.YAMLError as error:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise UserError(f"command line: {key}: '{shown}' cannot be read") from error


def own_texts(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Puts the words themselves where an option of somebody's own code asks for text and YAML saw none.

    Args:
        content: the recipe's, changed in place.
        overrides: `key=value`, all of which were read.
    """
    for override in overrides:
        key, _, words = override.partition("=")
        for holder, option, annotation in _own_option(content, keys_of(key)):
            value = holder.get(option)
            if words and option in holder and not _fits(value, annotation):
                texts = (words, _texts(words))
                holder[option] = next((text for text in texts if _fits(text, annotation)), value)


def _own_option(content: dict[str, Any], keys: list[str]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Where the option of a key lies, its name, and the type that somebody's own code gives it."""
    section, *rest = keys
    part = content.get(section)
    if not isinstance(part, dict) or not rest:
        return
    name, holder = part.get(NAMED.get(section, "")), cast("dict[str, Any] | None", part)
    if section == "method":
        name, holder = rest[0], part.get(rest[0])
    elif section in ("student", "teacher"):
        holder = part.get("options") if rest[0] == "options" else None
    if isinstance(name, str) and is_path(name) and isinstance(holder, dict):
        parameter = _parameters(name).get(rest[-1])
        if parameter is not None and parameter.annotation is not parameter.empty:
            yield holder, rest[-1], parameter.annotation


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(load_object(name), eval_str=True).parameters)
    except Exception:  # not there, no signature, or types that only its own file knows
        return {}


def _fits(value: Any, annotation: Any) -> bool:
    from pydantic import ConfigDict, TypeAdapter

    try:
        TypeAdapter(annotation, config=ConfigDict(strict=True)).validate_python(value)
    except Exception:  # a type that nobody checks fits anything
        return not _mentions_text(annotation)
    return True


def _mentions_text(annotation: Any) -> bool:
    return annotation is str or any(_mentions_text(part) for part in getattr(annotation, "__args__", ()))


def _texts(words: str) -> Any:
    try:
        return parse_texts(words)
    except yaml.YAMLError:
        return None


def keys_of(key: str) -> list[str]:
    """The parts of `a.b.c`; names of methods (`my.losses:MyLoss.power`) and layers may themselves hold dots.

    >>> keys_of("method.my_losses.py:MyLoss.power")
    ['method', 'my_losses.py:MyLoss', 'power']
    >>> keys_of("taps.layer1.0")
    ['taps', 'layer1.0']
    """
    section, _, rest = key.partition(".")
    where, colon, inside = rest.partition(":")
    if section != "method" or not colon:
        parts = key.split(".")
    else:
        name, *options = inside.split(".")
        parts = [section, f"{where}:{name}", *options]
    layers = next((i + 1 for i, part in enumerate(parts) if part in _BY_LAYER), len(parts))
    return [*parts[:layers], ".".join(parts[layers:])] if parts[layers:] else parts
