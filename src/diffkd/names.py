"""From a name in a recipe to the Python object it stands for, without a registry."""

import ast
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from diffkd.errors import UserError, nearest

T = TypeVar("T")


def check_kind(name: str, found: Any, what: str, kinds: tuple[type, ...] = ()) -> None:
    """Checks that what a name outside the library stands for is what it is asked for, before it is called.

    Args:
        name: as the user wrote it.
        found: what it stands for.
        what: it ought to be: "a function that builds a model", say.
        kinds: classes of which `found` may be a subclass; where there are none, any class may come.

    Raises:
        UserError: it is no function or class of that kind, or part of Python itself.

    >>> import os
    >>> check_kind("os:system", os.system, "a function that builds a model")
    Traceback (most recent call last):
    diffkd.errors.UserError: 'os:system' is part of Python, not a function that builds a model
    """
    if name.rpartition(":")[0].partition(".")[0] in sys.stdlib_module_names or inspect.isbuiltin(found):
        raise UserError(f"'{name}' is part of Python, not {what}")
    fits = (not kinds or issubclass(found, kinds)) if inspect.isclass(found) else callable(found)
    if not fits or inspect.ismodule(found):
        raise UserError(f"'{name}' is not {what}")


def is_path(name: str) -> bool:
    """Whether `name` points outside the library: `package.module:Name` or `folder/file.py:Name`.

    What follows one of the library's own sources of models does not, colon or not.

    >>> is_path("my_nets:Net"), is_path("torchvision/retinanet:timm/resnet18")
    (True, False)
    """
    where, colon, _ = name.partition(":")
    source, slash, rest = where.partition("/")
    ours = bool(slash) and not rest.endswith(".py") and source in submodules("diffkd.models")
    return bool(colon) and not ours


def load_object(name: str) -> Any:
    """The object that `package.module:Name` or `folder/file.py:Name` names.

    Modules are looked up as Python does, and in the current folder too.

    Raises:
        UserError: the module cannot be imported or has no such name.

    >>> load_object("collections:OrderedDict").__name__
    'OrderedDict'
    """
    where, _, attribute = name.rpartition(":")
    module = _load_file(Path(where)) if _looks_like_file(where) else _load_module(where, name)
    if not hasattr(module, attribute):
        known = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"'{name}': {where} has no '{attribute}'{nearest(attribute, known)}")
    return getattr(module, attribute)


def _looks_like_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where or os.sep in where


def _load_file(path: Path) -> ModuleType:
    path = path if path.suffix == ".py" else path.with_suffix(".py")
    if not path.is_file():
        raise UserError(f"no file '{path}'")
    if str(path.parent.resolve()) not in sys.path:  # its neighbours, as for a script
        sys.path.append(str(path.parent.resolve()))
    try:
        return importlib.import_module(OWN + os.fsencode(path.resolve()).hex())
    except Exception as error:
        raise UserError(f"'{path}' cannot be loaded: {type(error).__name__}: {error}") from error


OWN = "_diffkd_user_"


class _OwnFiles(MetaPathFinder):
    """Finds modules that are a user's own files by their names, which hold the file's path.

    So a process that is started anew to read samples finds the classes of what it is sent.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Where a module is; None of one that is no such file."""
        if not fullname.startswith(OWN):
            return None
        place = os.fsdecode(bytes.fromhex(fullname.removeprefix(OWN)))
        return importlib.util.spec_from_file_location(fullname, place)


if not any(isinstance(finder, _OwnFiles) for finder in sys.meta_path):
    sys.meta_path.append(_OwnFiles())


def _load_module(where: str, name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(where)
    except Exception as error:
        raise UserError(f"'{name}' cannot be loaded: {type(error).__name__}: {error}") from error


def sources_of(name: str) -> dict[str, Path]:
    """The files that hold what a name outside the library points to, by their paths from where it begins.

    Those are the module's own file and the files beside it that it imports, in whatever depth. What is
    installed counts for its own file alone.
    """
    where = name.rpartition(":")[0]
    if _looks_like_file(where):
        place = Path(where).with_suffix(".py").resolve()
        root = place.parent
    else:
        module = sys.modules.get(where) or _load_module(where, name)
        place = Path(getattr(module, "__file__", None) or "")
        if not place.is_file():
            return {}
        place = place.resolve()
        depth = where.count(".") + (place.name == "__init__.py")
        root = place.parents[depth]
    found: dict[str, Path] = {}
    _gather(place, root, found)
    return found


def _gather(place: Path, root: Path, found: dict[str, Path]) -> None:
    key = place.relative_to(root).as_posix()
    if key in found or not place.is_file():
        return
    found[key] = place
    if "site-packages" in place.parts or sysconfig.get_paths()["stdlib"] in map(str, place.parents):
        return
    try:
        tree = ast.parse(place.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        for folder, dotted in _imported(node, place, root):
            for depth in range(1, len(dotted) + 1):
                stem = folder.joinpath(*dotted[:depth])
                for file in (stem.with_suffix(".py"), stem / "__init__.py"):
                    if file.is_file() and file.resolve().is_relative_to(root):
                        _gather(file.resolve(), root, found)


def _imported(node: ast.AST, place: Path, root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Where an import statement may look among the neighbours, and for what."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield root, alias.name.split(".")
    elif isinstance(node, ast.ImportFrom):
        folder = place.parents[node.level - 1] if 0 < node.level <= len(place.parents) else root
        above = node.module.split(".") if node.module else []
        for alias in node.names:
            yield folder, [*above, alias.name]


# Files of a room that serve the others there and are not among its choices.
SUPPORT = (
    *("base", "choice", "detectors", "freeze", "matching", "measure", "origin", "query_detectors", "tensors"),
    "weights",
)


def submodules(package: str) -> list[str]:
    """Names of the files of a package that add something to it (`SUPPORT` and private ones aside).

    >>> "diffkd" in submodules("diffkd.methods")
    True
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(next(iter(spec.submodule_search_locations)))
    return sorted(p.stem for p in folder.glob("*.py") if p.stem not in SUPPORT and p.stem[0] != "_")


def load_submodule(package: str, name: str, what: str) -> ModuleType:
    """The module `package.name`, where `what` says in an error what was looked for.

    Raises:
        UserError: there is no such file in the package; the nearest names are given.
    """
    known = submodules(package)
    if name not in known:
        raise UserError(f"unknown {what} '{name}'{nearest(name, known)}")
    return importlib.import_module(f"{package}.{name}")


def load_class(package: str, name: str, base: type[T]) -> type[T]:
    """The subclass of `base` that a file of `package` defines, or that `path:Name` names.

    Raises:
        UserError: there is none, or what is there is not a subclass of `base`.
    """
    what = base.__name__.lower()
    if is_path(name):
        found = load_object(name)
        if not (inspect.isclass(found) and issubclass(found, base)):
            raise UserError(f"{what} '{name}' is not a subclass of diffkd.{base.__name__}")
        return found
    module = load_submodule(package, name, what)
    return next(
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
    )


def options_of(build: Any) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a method, data set or task: what a recipe may set.

    >>> list(options_of(lambda setup, *, num_steps=5: None))
    ['num_steps']
    """
    try:
        signature = inspect.signature(build, eval_str=True)
    except Exception:  # types that only its own file knows, for a checker
        signature = inspect.signature(build)
    return {n: p for n, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}
