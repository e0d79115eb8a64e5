"""The words of a command that takes pictures: its options told from them."""

import glob
from collections.abc import Sequence
from pathlib import Path

from diffkd.errors import UserError, nearest

_TRUTH = ("trust",)  # options that are true or false


def told_options(words: Sequence[str], known: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Options `key=value`, and what is left: pictures.

    Args:
        words: of the command line.
        known: the options that there are.

    Raises:
        UserError: nothing is left, a word is neither option nor picture, or a truth value is none.

    >>> told_options(["a.jpg", "top=3"], ("top",))
    ({'top': '3'}, ['a.jpg'])
    """
    options: dict[str, str] = {}
    pictures = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in known:
            if key in _TRUTH and value not in ("true", "false"):
                raise UserError(f"{word}: needs true or false")
            options[key] = value
        elif equals and key.isidentifier() and not Path(word).exists() and not glob.glob(word):  # noqa: PTH207
            raise UserError(f"'{word}' is no picture, and no option{nearest(key, known)}")
        else:
            pictures.append(word)
    if not pictures:
        raise UserError("name pictures: files, folders or patterns")
    return options, pictures
