"""The one exception for a user's mistake, and the words that help to mend it."""

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_SHOWN = 40  # names of which an error message has room


class UserError(Exception):
    """A mistake in what the user gave: one clear line that names the culprit and the way out.

    The command line prints it without a traceback and exits with status 2.
    """


class NotFiniteError(UserError):
    """A loss or a weight is infinite or nan: the settings do not train.

    Attributes:
        words: in every such message, by which one is known that comes as text alone.
    """

    words = "is not finite"


def nearest(word: str, choices: Iterable[str], limit: int = 3) -> str:
    """The names most like `word`, as the end of an error message.

    >>> nearest("diffdk", ["kd", "diffkd", "dist"])
    "; did you mean 'diffkd'?"
    >>> nearest("x", ["kd", "dist"])
    '; known: dist, kd'
    >>> said = nearest("x", ["head", *(f"body.{i}" for i in range(100))])
    >>> said[:22], said[-12:]
    ('; known: head, body.0,', ' and 61 more')
    """
    names = sorted(set(choices) - {""})
    close = difflib.get_close_matches(word, names, n=limit, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(f"'{name}'" for name in close) + "?"
    if not names:
        return ""
    shown = sorted(names, key=lambda name: name.count("."))[:_SHOWN]  # of layers the outer ones
    more = f" and {len(names) - len(shown):,} more" if len(shown) < len(names) else ""
    return f"; known: {', '.join(shown)}{more}"


def plain(text: str, most: int = 4000) -> str:
    r"""A text that a terminal shows as it is: one line, no codes that move the cursor, not endless.

    >>> plain("a\x1b[31m\nb")
    'a\\x1b[31m b'
    """
    shown = "".join(c if c.isprintable() else " " if c.isspace() else f"\\x{ord(c):02x}" for c in text)
    return shown if len(shown) <= most else f"{shown[:most]} ... ({len(shown) - most:,} more characters)"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing.

    >>> first_line(ValueError(" no such size ")), first_line(AssertionError())
    ('no such size', 'AssertionError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def told(error: Exception) -> str:
    """What an error of code that a user wrote says, in one line, and where in that code it came up.

    >>> told(ValueError("no such scan"))
    'ValueError: no such scan'
    """
    kind, first = type(error).__name__, first_line(error)
    said = kind if first == kind else f"{kind}: {first}"
    own = own_frames(error)
    return said + (f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else "")


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Where an error passed through code that a user wrote."""
    return [f for f in traceback.extract_tb(error.__traceback__) if not _installed(f.filename)]


def _installed(file: str) -> bool:
    return "site-packages" in file or file.startswith("<") or Path(__file__).parent in Path(file).parents


def kind_of(value: Any) -> str:
    """What a value is, in a user's words.

    >>> kind_of([1]), kind_of("ten")
    ('a list', "'ten'")
    """
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return repr(value)
