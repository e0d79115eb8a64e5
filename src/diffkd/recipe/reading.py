"""YAML read strictly: numbers as people write them, no dates, no bombs, every mistake in one line."""

import re
from pathlib import Path
from typing import Any

import yaml

from diffkd.errors import UserError, first_line, kind_of

# More than any recipe holds; a few aliases of aliases stand for more values than fit any memory.
MOST_VALUES = 20_000
MOST_BYTES = 2**20
MOST_DEPTH = 50
MOST_BITS = 64  # of a whole number: a seed's


def read_file(place: Path) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        UserError: it cannot be read or is no recipe; the file and, where known, the line are named.
    """
    try:
        if not place.is_file():
            raise UserError(f"'{place}' is not a file")
        with place.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"'{place}' cannot be read: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise UserError(f"'{place}' is too large for a recipe (more than 1 MB)")
    try:
        found = parse(content.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"'{place}' is not a text file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(
            f"{place}{line}: not YAML: {getattr(error, 'problem', None) or first_line(error)}"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{place}: a recipe is a mapping of keys, this is {kind_of(found)}")
    return found


def parse(text: str) -> Any:
    """The value that a text in YAML stands for.

    Raises:
        YAMLError: it is not YAML, or stands for more than a recipe may hold.

    >>> parse("{lr: 5e-4, from: 2026-11-31}")
    {'lr': 0.0005, 'from': '2026-11-31'}
    """
    return _parsed(text, _Loader)


def parse_texts(text: str) -> Any:
    """As `parse`, but every plain value is the text that stands there.

    >>> parse_texts("[no, 1, 2.50]")
    ['no', '1', '2.50']
    """
    return _parsed(text, yaml.BaseLoader)


def _parsed(text: str, loader: Any) -> Any:
    try:
        found = yaml.load(text, loader)
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("nested too deep") from None
    except Exception as error:  # its constructors raise nearly anything for values such as 0x_
        raise yaml.YAMLError(f"a value cannot be read ({type(error).__name__}: {error})") from error
    _count(found, 0, 0)
    return found


def _count(value: Any, depth: int, seen: int) -> int:
    """How many values there are with every alias written out, `seen` before this one among them."""
    seen += 1
    if depth > MOST_DEPTH:
        raise yaml.YAMLError("nested too deep")
    if seen > MOST_VALUES:
        raise yaml.YAMLError("it stands for more values than a recipe may hold")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise yaml.YAMLError(f"a whole number of more than {MOST_BITS} bits")
    if isinstance(value, str) and "\0" in value:  # no file's name can have one
        raise yaml.YAMLError("a text with a null character")
    inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    if isinstance(inside, list | tuple | set):
        for item in inside:
            seen = _count(item, depth + 1, seen)
    return seen


class _Loader(yaml.SafeLoader):
    """YAML that reads `5e-4` as a number; dates, times (`1:30`) and numbers that begin with 0 as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys all differ."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{twice}' stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(([0-9][0-9_]*)?\.[0-9_]+|[0-9][0-9_]*\.)([eE][-+]?[0-9]+)?$|^[-+]?\d+[eE][-+]?\d+$"
        r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
