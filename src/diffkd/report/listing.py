"""What there is to choose from, told without loading it."""

import ast
import importlib
import zlib
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

import diffkd
from diffkd.errors import UserError, nearest
from diffkd.names import submodules
from diffkd.pictures.kept import cache_folder
from diffkd.recipe.files import builtin
from diffkd.runs.disk import write_atomically

KINDS = ("recipes", "methods", "models", "data")


def listing(what: str = "", like: str = "") -> Iterator[str]:
    """Lines of names, each with what it is; `like` keeps the names that contain it.

    Raises:
        UserError: `what` is none of the kinds.
    """
    if what and what not in KINDS:
        raise UserError(f"cannot list '{what}'{nearest(what, KINDS)}")
    for kind in [what] if what else KINDS:
        if not what:
            yield f"{kind}:"
        lines = _recipes() if kind == "recipes" else _models(what) if kind == "models" else _files(kind)
        yield from (f"  {line}" if not what else line for line in lines if like in line)


def _recipes() -> Iterator[str]:
    for name, place in sorted(builtin().items()):
        text = place.read_text()
        first = text.splitlines()[0]
        said = first.lstrip("# ") if first.startswith("#") else ""
        published = (yaml.safe_load(text) or {}).get("published") or {}
        lacks = "; DiffKD: not published for this pair" * bool(published and "diffkd" not in published)
        yield f"{name:<48}{said}{lacks}".rstrip()


def _files(kind: str) -> Iterator[str]:
    for name in submodules(f"diffkd.{kind}"):
        place = Path(diffkd.__file__).parent / kind / f"{name}.py"
        weight = f" [weight {_weight(place):g}]" if kind == "methods" and name != "none" else ""
        yield f"{name:<16}{_first_line(place)}{weight}"


def _models(what: str) -> Iterator[str]:
    """Sources, or every model where models alone are asked for."""
    for source in submodules("diffkd.models"):
        if not what:
            place = Path(diffkd.__file__).parent / "models" / f"{source}.py"
            yield f"{source + '/...':<16}{_first_line(place)}"
        else:
            yield from (f"{source}/{name}" for name in _names(source))


def _names(source: str) -> list[str]:
    """Every model of a source. Kept in the cache, for the source's library takes seconds to import."""
    place = cache_folder() / "names" / f"{source}-{_state_of_models()}.txt"
    with suppress(OSError, ValueError):
        return place.read_text().splitlines()
    names: list[str] = importlib.import_module(f"diffkd.models.{source}").names()
    with suppress(OSError):  # a cache that cannot be written is no reason to stop
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, lambda partial: partial.write_text("\n".join(names)))
    return names


def _state_of_models() -> str:
    """A short name of what the models' names depend on: the libraries' versions, and the files here."""
    told = []
    for library in ("timm", "torchvision", "transformers", "segmentation-models-pytorch"):
        with suppress(PackageNotFoundError):
            told.append(f"{library} {version(library)}")
    files = sorted((Path(diffkd.__file__).parent / "models").glob("*.py"))
    told += [f"{place.name} {place.stat().st_size} {place.stat().st_mtime_ns}" for place in files]
    return f"{zlib.crc32(' '.join(told).encode()):08x}"


def _weight(place: Path) -> float:
    """The weight that a method's file says, or that of `Method`."""
    kinds = [node for node in ast.parse(place.read_text()).body if isinstance(node, ast.ClassDef)]
    for node in (statement for kind in kinds for statement in kind.body):
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["weight"]:
            return float(ast.literal_eval(node.value))
    return 1.0


def _first_line(place: Path) -> str:
    return (ast.get_docstring(ast.parse(place.read_text())) or "").splitlines()[0]
