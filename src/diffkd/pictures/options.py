"""What the data sets' builders share: a dataclass of options spread into keywords, and a checked root."""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from diffkd.errors import UserError

T = TypeVar("T")
_MOST_CLASSES = 10_000_000


def spread(options: type) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Replaces a function's keyword `options` by the fields of that dataclass.

    The function's signature then shows every field as a keyword-only parameter of its own, and its
    docstring ends with where they are described; the function itself gets them as one object.

    Args:
        options: a dataclass whose fields all have defaults.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Look:
    ...     size: int = 8
    >>> @spread(Look)
    ... def build(root, *, fast: bool = False, options: Look):
    ...     return root, fast, options
    >>> build("a", size=3)
    ('a', False, Look(size=3))
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        signature = inspect.signature(function, eval_str=True)
        own = [p for name, p in signature.parameters.items() if name != "options"]
        spread_out = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(options)
        ]

        @functools.wraps(function)
        def wrapper(*args: Any, **given: Any) -> T:
            chosen = {p.name: given.pop(p.name) for p in spread_out if p.name in given}
            return function(*args, **given, options=options(**chosen))

        wrapper.__signature__ = signature.replace(parameters=own + spread_out)  # type: ignore[attr-defined]
        wrapper.__doc__ = (
            f"{function.__doc__}\n    Further options: `{options.__module__}.{options.__qualname__}`."
        )
        return wrapper

    return decorate


def data_folder(root: str | None, name: str) -> Path:
    """The folder that `data.root` names, for the data set `name`.

    Raises:
        UserError: no root is given, or it is not a folder.

    >>> data_folder(".", "folder").is_dir()
    True
    """
    if root is None:
        raise UserError(f"data '{name}' needs to know where it is: data.root=FOLDER")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        found = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data.root='{root}' {found}")
    return folder


def class_count(
    given: int | None, classes: Sequence[str] = (), labels: Mapping[str, Any] | None = None
) -> int:
    """The number of classes: as the user says, or else of the names, or else the highest label plus one.

    Args:
        given: `data.num_classes`.
        classes: names of the classes, where they have names.
        labels: for each place that holds labels, as an error calls it, the class indices there, an
            array or a tensor; None where there are none.

    Raises:
        UserError: the number is not known, differs from that of the names, or is exceeded by a label.

    >>> import numpy as np
    >>> class_count(None, ("cat", "dog")), class_count(None, labels={"'photos.csv'": np.array([0, 2])})
    (2, 3)
    """
    highest = {place: int(values.max()) for place, values in (labels or {}).items() if values is not None}
    count = len(classes) or max(highest.values(), default=-1) + 1 if given is None else given
    if given is None and count == 0:
        raise UserError("without labels, say how many classes the teacher tells apart: data.num_classes=K")
    if count < 1 or count != (len(classes) or count):
        raise UserError(
            f"data.num_classes={given}"
            + (f", but there are {len(classes)} classes" if classes else " is too few")
        )
    samples = sum(len(values) for values in (labels or {}).values() if values is not None)
    if count > _MOST_CLASSES or (given is None and not classes and count > max(10 * samples, 1000)):
        raise UserError(
            f"the labels would make {count} classes; number them from 0, without gaps"
            if given is None
            else f"data.num_classes={count} is more than {_MOST_CLASSES}"
        )
    for place, label in highest.items():
        if label >= count:
            raise UserError(f"{place} holds the label {label}, outside 0 to {count - 1} for {count} classes")
    return count


def same_classes(train: Sequence[str], test: Sequence[str], where: str) -> None:
    """Checks that a test split has no other classes than the training split; it may lack some.

    Raises:
        UserError: it has others; the first few are named, and `where` the test split is.

    >>> same_classes(("cat",), ("cat", "dog"), "photos/test")
    Traceback (most recent call last):
    diffkd.errors.UserError: the classes of 'photos/test' differ from those to train on: it has also 'dog'
    """
    missing, unknown = sorted(set(train) - set(test)), sorted(set(test) - set(train))
    parts = [
        f"{verb} {quoted(names)}" for verb, names in (("lacks", missing), ("has also", unknown)) if names
    ]
    if unknown:
        raise UserError(f"the classes of '{where}' differ from those to train on: it {' and '.join(parts)}")


def class_notes(
    count: int, train: np.ndarray | None, test: np.ndarray | None, classes: Sequence[str] = ()
) -> tuple[str, ...]:
    """What is odd about the labels of two splits: classes of which they have no picture.

    Args:
        count: the number of classes.
        train: `(N,)` class indices; None where there are no labels.
        test: likewise.
        classes: names of the classes, where they have names.

    >>> class_notes(4, np.array([1, 2, 3]), np.array([1, 2]))[0]
    'no training picture of class 0 (labels from 1 to 3): data.first_label=1 counts classes from 1'
    >>> class_notes(4, np.array([1, 2, 3]), np.array([1, 2]))[1]
    "no test picture of class '3', which no figure counts"
    """
    found = []
    absent = {
        what: [] if labels is None else np.setdiff1d(np.arange(count), labels).tolist()
        for what, labels in (("training", train), ("test", test))
    }
    lacking = absent["training"]
    if train is not None and len(train) and lacking == list(range(train.min())):
        if lacking:
            low, high = len(lacking), int(train.max())
            what = "class 0" if low == 1 else f"classes 0 to {low - 1}"
            found.append(
                f"no training picture of {what} (labels from {low} to {high}): "
                f"data.first_label={low} counts classes from {low}"
            )
    elif lacking:
        found.append(f"no training picture of {_classes(lacking, classes)}")
    lacking = sorted(set(absent["test"]) - set(absent["training"]))
    if lacking:
        found.append(f"no test picture of {_classes(lacking, classes)}, which no figure counts")
    return (*found, *alike(classes))


def alike(names: Sequence[str]) -> Iterator[str]:
    """A note on names of classes that differ in capitals alone."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(name.casefold(), name)
        if other != name:
            yield f"the classes '{other}' and '{name}' differ in capitals alone"
            return


def _classes(places: Sequence[int], names: Sequence[str]) -> str:
    shown = quoted([names[place] if names else str(place) for place in places])
    return f"class{'es' * (len(places) > 1)} {shown}"


def quoted(names: Sequence[str], limit: int = 3) -> str:
    """The first few names.

    >>> quoted("abcd")
    "'a', 'b', 'c' and 1 more"
    """
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def natural_key(name: str) -> list[tuple[int, str]]:
    """A key that sorts the numbers in names as numbers.

    >>> sorted(["a10", "a9", "b"], key=natural_key)
    ['a9', 'a10', 'b']
    """
    parts = re.split("([0-9]+)", name)
    return [(int(part), "") if place % 2 else (-1, part) for place, part in enumerate(parts)]
