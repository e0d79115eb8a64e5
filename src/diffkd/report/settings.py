"""What a recipe may say: every key with its type, its default and what it does, and a schema for editors."""

import importlib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from diffkd.errors import UserError, nearest
from diffkd.names import is_path, options_of, submodules
from diffkd.recipe import schema, training
from diffkd.recipe.base import Section

_SECTIONS: dict[str, tuple[type, ...]] = {
    "recipe": (schema.Recipe,),
    "task": (schema.TaskRecipe,),
    "data": (schema.DataRecipe,),
    "student": (schema.ModelRecipe,),
    "teacher": (schema.TeacherRecipe,),
    "teacher.train": (schema.TeacherTraining,),
    "method": (schema.MethodRecipe,),
    "optimizer": (training.Sgd, training.AdamW, training.RmspropTf),
    "schedule": get_args(training.ScheduleRecipe),
    "trainer": (training.TrainerRecipe,),
}
_ROOMS = ("methods", "data", "tasks")
_WEIGHT = "of all its losses beside the supervised ones; auto measures it."
_HEAD = re.compile(r"(\w+(?:, \w+)*): ?(.*)")


def json_schema() -> dict[str, Any]:
    """A JSON schema of recipes, for editors of YAML; names of methods, data and tasks stay open.

    >>> "student" in json_schema()["properties"]
    True
    """
    return schema.Recipe.model_json_schema()


class Setting(NamedTuple):
    """One key of a recipe: where it stands, its type, its default and what it does, in words."""

    key: str
    kind: str
    default: str
    said: str


class Group(NamedTuple):
    """The settings of a section, a method, a data set or a task, and what that is."""

    title: str
    said: str
    settings: list[Setting]


def settings(what: str = "", width: int | None = None) -> Iterator[str]:
    """Lines `key  type  default  sentence` of a section, a method, a data set or a task; of all sections.

    Args:
        what: its name, or a part of keys' names, wherever they stand; none is all sections.
        width: characters of a line, where the sentence stands beneath; None has one line for each key.

    Raises:
        UserError: there is nothing of that name.

    >>> list(settings("kd", 60))[2:4]
    ['  method.kd.weight  number | auto  0.9', '      of all its losses beside the supervised ones; auto']
    """
    for group in _named(what):
        yield from wrapped(f"{group.title}: {group.said}", width, 2)
        for one in group.settings:
            if width is None:
                yield f"  {one.key:<31} {one.kind:<27} {one.default:<15} {one.said}".rstrip()
            else:
                yield from wrapped("  " + "  ".join(filter(None, one[:3])), width, 6)
                yield from wrapped(f"      {one.said}", width, 6)


def _named(what: str) -> Iterator[Group]:
    """The groups of a name; where there is none, of all groups the keys that hold it.

    >>> [(group.title, [one.key for one in group.settings]) for group in _named("boundary")]
    [('task=segmentation', ['task.boundary_ratio'])]
    """
    try:
        yield from list(groups(what))
    except UserError:
        every = [group for name in _SECTIONS for group in groups(name)]
        for room in _ROOMS:
            for name in submodules(f"diffkd.{room}"):
                of = "" if room == "methods" else f"={name}"
                every += [group._replace(title=f"{group.title}{of}") for group in groups(name)]
        held = (
            group._replace(settings=[one for one in group.settings if what in one.key]) for group in every
        )
        found = [group for group in held if group.settings]
        if not found:
            raise
        yield from found


def wrapped(line: str, width: int | None, indent: int) -> list[str]:
    """A line in lines of `width` characters, those after the first one indented; None leaves it as it is."""
    if width is None:
        return [line]
    fill = " " * indent
    return textwrap.wrap(line, width, subsequent_indent=fill, break_long_words=False, break_on_hyphens=False)


def groups(what: str = "") -> Iterator[Group]:
    """The settings of a section, a method, a data set or a task; of all sections.

    Raises:
        UserError: there is nothing of that name.

    >>> next(groups("kd")).settings[0][:3]
    ('method.kd.weight', 'number | auto', '0.9')
    """
    for name in [what] if what else _SECTIONS:
        yield from _section(name) if name in _SECTIONS else _choice(name)


def _section(name: str) -> Iterator[Group]:
    for kind in _SECTIONS[name]:
        fields: Mapping[str, FieldInfo] = kind.model_fields  # type: ignore[attr-defined]
        chosen = fields["name"].default if len(_SECTIONS[name]) > 1 else None
        told = {k: v for base in reversed(kind.__mro__) for k, v in described(base.__doc__, fields).items()}
        group = Group(f"{name}{f' {chosen}' if chosen else ''}", _sentence(inspect.getdoc(kind) or ""), [])
        prefix = "" if name == "recipe" else f"{name}."
        for key, field in fields.items():
            default = field.get_default(call_default_factory=True)
            shown = "" if isinstance(default, Section) else _default(default)
            group.settings.append(
                Setting(f"{prefix}{key}", _kind(field.annotation), shown, told.get(key, ""))
            )
        yield group


def _choice(name: str) -> Iterator[Group]:
    """The options of a method, a data set or a task."""
    from diffkd.data.base import builder
    from diffkd.methods.base import method_class
    from diffkd.tasks.base import task_class

    finders: dict[str, Any] = {"methods": method_class, "data": builder, "tasks": task_class}
    rooms = [room for room in _ROOMS if name in submodules(f"diffkd.{room}")]
    if not rooms:
        if is_path(name):
            raise UserError(f"settings of '{name}': code of your own is not loaded; see its own docstring")
        known = [*_SECTIONS, *(choice for room in _ROOMS for choice in submodules(f"diffkd.{room}"))]
        raise UserError(f"no section, method, data set or task '{name}'{nearest(name, known)}")
    for room in rooms:
        build = finders[room](name)
        options, where = options_of(build), {"methods": f"method.{name}", "tasks": "task"}.get(room, room)
        group = Group(where, _sentence(inspect.getdoc(build) or ""), [])
        if room == "methods":
            group.settings.append(
                Setting(f"{where}.weight", "number | auto", _default(build.weight), _WEIGHT)
            )
        told = _told(build, options)
        for key, option in options.items():
            needed = option.default is option.empty
            default = "needed" if needed else _default(option.default)
            kind = "any" if option.annotation is option.empty else _kind(option.annotation)
            group.settings.append(Setting(f"{where}.{key}", kind, default, told.get(key, "")))
        yield group


def _told(build: Any, options: Mapping[str, Any]) -> dict[str, str]:
    """What the docstring of a method, data set or task, and those that it points to, say of its options."""
    text = inspect.getdoc(build) or ""
    told = described(text, options)
    for key, said in list(told.items()):  # "as in `Other`" of the same file
        other = re.fullmatch(r"as in `(\w+)`\.?", said)
        if other:
            whole = inspect.getdoc(getattr(inspect.getmodule(build), other[1], None))
            told |= {key: described(whole, options).get(key, said)}
    for room, name in re.findall(r"Further options: `([\w.]+)\.(\w+)`", text):  # spread into keywords
        told = described(inspect.getdoc(getattr(importlib.import_module(room), name)), options) | told
    return told


def described(text: str | None, keys: Mapping[str, Any]) -> dict[str, str]:
    r"""The first sentence that a docstring's `Args:` or `Attributes:` has for each key.

    >>> described("Sum.\n\nArgs:\n    a, b: the numbers,\n        both. More.", {"b": 0})
    {'b': 'the numbers, both.'}
    """
    found: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in inspect.cleandoc(text or "").splitlines():
        if re.fullmatch(r"\w+:", line):
            inside, names = line in ("Args:", "Attributes:"), []
        elif inside and line.startswith("    "):
            head = _HEAD.fullmatch(line[4:])
            if head and line[4] != " ":
                names = head[1].split(", ")
            said = head[2] if head and line[4] != " " else line.strip()
            for name in names:
                found[name] = f"{found.get(name, '')} {said}".strip()
    for said in list(found.values()):  # `mean, std: ...; size: ...` is about two
        for part in said.split("; ")[1:]:
            head = _HEAD.fullmatch(part)
            if head and all(name in keys for name in head[1].split(", ")):
                found |= dict.fromkeys(head[1].split(", "), head[2])
    return {name: _sentence(said) for name, said in found.items() if name in keys}


def _sentence(text: str) -> str:
    """The first sentence, as one line."""
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r'(?<=[^.][^.][.])\s+(?=[A-Z`"0-9])', first)[0]


def _default(value: Any) -> str:
    if value is PydanticUndefined or value is None:
        return "needed" if value is PydanticUndefined else "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


_WORDS: dict[Any, str] = {int: "integer", float: "number", str: "text", bool: "true | false", Any: "any"}
_WORDS[type(None)] = "null"


def _kind(annotation: Any) -> str:
    """A type in a recipe's words.

    >>> _kind(Literal["a", "b"] | None), _kind(list[int])
    ('a | b | null', 'list of integer')
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0])
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(_kind, parts)))
    if origin in (list, tuple):
        return f"list of {_kind(parts[0])}"
    if origin is dict:
        return f"{_kind(parts[1])} by name"
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        return "section"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
