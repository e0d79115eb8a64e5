"""What determines a run's result, in one place: recipe, data, weights, own code, versions, global batch.

It is written into the run, and asked for wherever a result may serve again: by a run that goes on, by
made teachers, by a comparison.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import diffkd
from diffkd.models.base import PART_WEIGHTS
from diffkd.models.weights import is_local, weights_file
from diffkd.names import is_path, sources_of
from diffkd.recipe.schema import ModelRecipe, Recipe
from diffkd.runs.content import combined, file_digest

# Digests or values by name, for each kind of thing that determines a result.
Identity = dict[str, dict[str, str]]

# Keys of a recipe that may differ between two runs of one result.
_INDIFFERENT: Any = {
    "output": True,
    "resume": True,
    "data": {"workers", "eval_batch_size", "root", "unlabelled", "max_corrupt"},
    "trainer": {
        *("accelerator", "devices", "num_nodes", "strategy", "threads"),
        *("log_every", "save_every", "keep", "progress", "loggers"),
    },
}


def identify(recipe: Recipe, data: Mapping[str, str]) -> Identity:
    """All that determines the result of a recipe on the data that it names.

    Args:
        recipe: the run.
        data: digests of the data, see `diffkd.runs.content`.
    """
    return {
        "recipe": {"recipe": combined(f"{k}={v!r}" for k, v in sorted(_flatten(_determining(recipe))))},
        "data": dict(data),
        "weights": dict(_weights(recipe)),
        "code": dict(_code(recipe)),
        "versions": {"diffkd": diffkd.__version__, "torch": torch.__version__.partition("+")[0]},
        "global batch": {"samples": str(recipe.data.batch_size)},
    }


def short_name(identity: Identity) -> str:
    """All of it as one short name."""
    return combined([json.dumps(identity, sort_keys=True)])


def changed(there: Identity, here: Identity) -> str | None:
    """What differs between two identities but for their recipes, in words; None where nothing does.

    >>> changed({"data": {"test labels": "a"}}, {"data": {"test labels": "b"}})
    'data (test labels)'
    >>> changed({"versions": {"torch": "2.8.0"}}, {"versions": {"torch": "2.9.0"}})
    'versions (torch is 2.8.0 there and 2.9.0 here)'
    """
    said = []
    for part, ours in here.items():
        theirs = there.get(part)
        if part == "recipe" or theirs is None:
            continue
        names = [name for name in sorted(theirs | ours) if theirs.get(name) != ours.get(name)]
        if part in ("versions", "global batch"):
            names = [f"{name} is {theirs.get(name)} there and {ours.get(name)} here" for name in names]
        if names:
            said.append(f"{part} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})")
    return " and ".join(said) or None


def difference(one: Recipe, other: Recipe) -> str | None:
    """The first key in which two recipes would give different results, with both values."""
    ours, theirs = dict(_flatten(_determining(one))), dict(_flatten(_determining(other)))
    for key in ours | theirs:
        if ours.get(key) != theirs.get(key):
            return f"{key} is {ours.get(key)} there and {theirs.get(key)} here"
    return None


def _determining(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what is indifferent; files of weights count by their content, not their place."""
    content = recipe.model_dump(mode="json", exclude=_INDIFFERENT)
    content["task"]["weight"] = recipe.task_weight
    for limit in ("patience", "max_minutes"):  # none is as if there were no such key
        if content["trainer"][limit] is None:
            del content["trainer"][limit]
    if content["data"]["class_order"] is None:
        del content["data"]["class_order"]
    teachers = content.pop("teachers")  # as if there were no such key where there are none
    content |= {f"teachers.{name}": told for name, told in teachers.items()}
    if not teachers and content["teacher"] is not None:
        del content["teacher"]["share"]
    for name, model in (("student", recipe.student), *_teachers(recipe)):
        for key in _weights_files(model):
            place = content[name] if key == "weights" else content[name]["options"]
            place[key] = "a file"
    return content


def _teachers(recipe: Recipe) -> Iterator[tuple[str, ModelRecipe]]:
    for name, teacher in recipe.every_teacher.items():
        yield name if name == "teacher" else f"teachers.{name}", teacher


def _models(recipe: Recipe) -> Iterator[tuple[str, ModelRecipe]]:
    yield "student", recipe.student
    if recipe.method:  # without a method nobody asks them
        yield from _teachers(recipe)


def _weights(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for name, model in _models(recipe):
        for key, place in _weights_files(model).items():
            yield f"{name}.{key}", file_digest(weights_file(place))


def _weights_files(model: ModelRecipe) -> dict[str, str]:
    """Files of weights that a model starts from, by their keys: of the whole, or of a part (an option)."""
    parts = {key: model.options.get(key) for key in PART_WEIGHTS}
    named = {"weights": model.weights, **parts}
    return {key: place for key, place in named.items() if isinstance(place, str) and is_local(place)}


def _code(recipe: Recipe) -> Iterator[tuple[str, str]]:
    names = [recipe.task.name, recipe.data.name, *(m.model for _, m in _models(recipe)), *recipe.method]
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(filter(is_path, names)):
        for key, place in sources_of(name).items():
            found.setdefault(key, []).append(file_digest(place))
    for key, values in found.items():
        yield key, combined(values)


def _flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, content
