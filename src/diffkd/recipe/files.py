"""Recipes as layers of plain values: reading YAML, short forms, overrides, merging."""

from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffkd.errors import UserError, kind_of, nearest
from diffkd.names import is_path
from diffkd.recipe.reading import read_file
from diffkd.recipe.words import NAMED, keys_of, parse_override

RECIPES = Path(__file__).parent.parent / "recipes"


class Layers(NamedTuple):
    """A recipe before it is checked.

    Attributes:
        content: as plain values, short forms written out.
        place: the recipe's file.
        trusted: the names of code that stand on the command line, or all where it says `trust=true`.
    """

    content: dict[str, Any]
    place: Path
    trusted: Container[str]


def read_layers(name: str, overrides: Sequence[str], methods: Sequence[str] = ()) -> Layers:
    """A recipe's content with its bases below and its overrides above, short forms written out.

    Args:
        name: of the recipe.
        overrides: `key=value`.
        methods: whose options may be set although the recipe does not use them.

    Raises:
        UserError: a file or an override cannot be read.
    """
    place = find(name)
    merged: dict[str, Any] = {}
    for layer in _read_chain(place):
        merged = _merge(merged, _normalize(layer, str(place)), replace=("method", "taps"))
    trusted: Container[str] = set(methods)
    chosen = any(override.startswith("method=") for override in overrides)
    for key, value in sorted(map(parse_override, overrides), key=_depth):
        if key == "base":
            raise UserError("command line: 'base' belongs in a file")
        if key == "trust":
            if not isinstance(value, bool):
                raise UserError("command line: trust: needs true or false")
            trusted = _Everything() if value else trusted
            continue
        _check_method(key, merged, methods, chosen)
        layer = _normalize(_nest(key, value), "command line")
        if isinstance(trusted, set):
            trusted |= {name for _, name in code_names(layer)}
        # A single key replaces a method; a dotted one changes an option of it.
        replace = ("method", "taps") if "." not in key else ()
        merged = _merge(merged, layer, replace=replace)
    if "trust" in merged:
        raise UserError(f"{place}: 'trust' belongs on the command line")
    merged["name"] = _short_name(name, place)
    return Layers(merged, place, trusted)


class _Everything:
    def __contains__(self, name: object) -> bool:
        return True


def _check_method(key: str, merged: dict[str, Any], methods: Sequence[str], chosen: bool) -> None:
    """Refuses an option of a method that is not used, where the command line says which are."""
    section, *rest = keys_of(key)
    used = merged.get("method") or {}
    if section == "method" and rest and chosen and rest[0] not in {*used, *methods}:
        raise UserError(
            f"command line: {key}: '{rest[0]}' is not among the methods ({', '.join(used) or 'none'}); "
            f"say method={','.join([*used, rest[0]])}, or leave it out"
        )


def code_names(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys of a recipe that name code outside the library, with what they name."""
    for section, name in (*NAMED.items(), ("method", "")):
        part = content.get(section)
        if isinstance(part, dict):
            names = list(part) if section == "method" else [part.get(name)]
            key = section if section == "method" else f"{section}.{name}"
            yield from ((key, name) for name in names if isinstance(name, str) and is_path(name))
    for teacher in teachers_in({"teachers": content.get("teachers")}):
        if isinstance(model := teacher.get("model"), str) and is_path(model):
            yield "teachers.model", model


def teachers_in(content: dict[str, Any]) -> list[dict[str, Any]]:
    """All teachers of a recipe, as far as they are sections."""
    further = content.get("teachers")
    found = [content.get("teacher"), *(further.values() if isinstance(further, dict) else ())]
    return [teacher for teacher in found if isinstance(teacher, dict)]


def builtin() -> dict[str, Path]:
    """The recipes that come along, by name; files and folders that begin with `_` are bases."""
    found = {}
    for place in sorted(RECIPES.rglob("*.yaml")):
        parts = place.relative_to(RECIPES).with_suffix("").parts
        if not any(part.startswith("_") for part in parts):
            found["/".join(parts)] = place
    return found


def find(name: str) -> Path:
    """The file of a recipe: a built-in name, or a path.

    Raises:
        UserError: there is none.
    """
    known = builtin()
    if name in known:
        return known[name]
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"no recipe file '{name}'")
        return Path(name)
    raise UserError(f"unknown recipe '{name}'{nearest(name, known)} (a file's name ends in .yaml)")


def _short_name(name: str, place: Path) -> str:
    return name if name in builtin() else place.parent.name if place.name == "recipe.yaml" else place.stem


def _read_chain(place: Path, below: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The recipe and its bases, the lowest first."""
    if place in below:
        raise UserError(f"{place}: 'base' comes back to itself")
    content = read_file(place)
    base = content.pop("base", None)
    if base is None:
        return [content]
    return [*_read_chain(_find_base(str(base), place), (*below, place)), content]


def _find_base(base: str, place: Path) -> Path:
    for candidate in (place.parent / base, place.parent / f"{base}.yaml", RECIPES / f"{base}.yaml"):
        if candidate.is_file():
            return candidate.resolve()
    raise UserError(f"{place}: base: unknown recipe '{base}'{nearest(base, builtin())}")


def _depth(override: tuple[str, Any]) -> tuple[int, bool]:
    """What a section is before what is in it: `data=table` keeps a `data.root=...` that stands before it."""
    parts = keys_of(override[0])
    return len(parts), parts[-1] != NAMED.get(parts[0])


def _nest(key: str, value: Any) -> dict[str, Any]:
    """`a.b.c=v` as nested mappings."""
    for part in reversed(keys_of(key)):
        value = {part: value}
    return value  # type: ignore[no-any-return]


# Keys that outlive a change of name.
_GENERIC = {
    "task": {"weight"},
    "data": {"batch_size", "eval_batch_size", "workers"},
    "optimizer": {"lr", "weight_decay"},
    "schedule": {"warmup_epochs", "warmup_steps"},
    "teacher": {"train", "weights"},
    "student": {"weights"},
}
# Of these keys one stands: the upper layer's takes the other's place.
_EITHER = {
    "trainer": (("epochs", "steps"), ("eval_every", "eval_epochs")),
    "train": (("epochs", "steps"),),
    "schedule": (("warmup_epochs", "warmup_steps"),),
}


def _normalize(layer: dict[str, Any], where: str) -> dict[str, Any]:
    """A layer with every short form written out."""
    layer = dict(layer)
    for section, name in NAMED.items():
        if isinstance(layer.get(section), str):
            layer[section] = {name: layer[section]}
    if "method" in layer:
        layer["method"] = _methods(layer["method"], where)
    layer |= {key: _teacher(layer[key], where) for key in ("teacher",) if key in layer}
    if isinstance(further := layer.get("teachers"), dict):
        layer["teachers"] = {
            name: _teacher({"model": told} if isinstance(told, str) else told, where)
            for name, told in further.items()
        }
    return layer


def _teacher(teacher: Any, where: str) -> Any:
    """A teacher with the short forms in its training written out."""
    if not isinstance(teacher, dict) or not isinstance(teacher.get("train"), dict):
        return teacher
    return {**teacher, "train": _normalize(teacher["train"], where)}


def _methods(value: Any, where: str) -> dict[str, Any]:
    """`diffkd`, `diffkd,kd`, `diffkd+kd`, `[diffkd, kd]`, `{diffkd: 0.5}` or the long form as that."""
    if value in (None, "none", []):
        return {}
    if isinstance(value, str):
        value = [name for part in value.split(",") for name in _joined(part)]
    if isinstance(value, list):
        value = {str(name).strip(): {} for name in value}
    if not isinstance(value, dict):
        raise UserError(f"{where}: method: needs names, or names with weights, got {kind_of(value)}")
    long: dict[str, Any] = {}
    for name, options in value.items():
        number = options == "auto" or (isinstance(options, int | float) and not isinstance(options, bool))
        long[name] = {"weight": options} if number else {} if options is None else options
    return {name: options for name, options in long.items() if name != "none"}


def _joined(names: str) -> list[str]:
    """The names in `diffkd+kd`; a file's name may itself hold a plus.

    >>> _joined("diffkd+my.py:Loss"), _joined("c++/my.py:Loss")
    (['diffkd', 'my.py:Loss'], ['c++/my.py:Loss'])
    """
    parts = names.split("+")
    return parts if all(part.strip().isidentifier() or is_path(part) for part in parts) else [names]


def _merge(old: dict[str, Any], new: dict[str, Any], replace: Sequence[str] = ()) -> dict[str, Any]:
    """The new layer over the old."""
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and key not in replace:
            merged[key] = _merge(_survivors(key, before, value), value)
        else:
            merged[key] = value
    return merged


def _survivors(section: str, before: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """What stays of a section under a layer that says another length, name or model."""
    for pair in _EITHER.get(section, ()):
        said = [key for key in pair if value.get(key) is not None]
        before = {key: v for key, v in before.items() if key not in pair or not said or key in said}
    name = NAMED.get(section)
    if name is None or name not in value or value[name] == before.get(name):
        return before
    kept = {key: v for key, v in before.items() if key in _GENERIC.get(section, ())}
    # Of weights, only the wish for whatever is published fits another model too.
    return {key: v for key, v in kept.items() if key != "weights" or v == "available"}
