"""Which folders of a data set are its splits, whatever people call them."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from diffkd.errors import UserError
from diffkd.pictures.options import quoted
from diffkd.pictures.scan import SYSTEM

TRAIN_NAMES = ("train", "training")
USUAL_TEST_NAMES = ("val", "valid", "validation", "test")  # sure to be no class
TEST_NAMES = (*USUAL_TEST_NAMES, "testing", "eval", "evaluation", "dev")
_WORD = re.compile(rf"(?:^|[^a-z])({'|'.join((*TRAIN_NAMES, *TEST_NAMES))})(?:[^a-z]|$)")


class Splits(NamedTuple):
    """Folders by what they are for.

    Attributes:
        train: name of the folder to train on; None where there is none.
        test: likewise, to test on.
        notes: what was chosen, or passed by.
    """

    train: str | None
    test: str | None
    notes: tuple[str, ...]


def find_splits(folder: Path, test_folder: str | None = None) -> Splits:
    """The splits in a folder: `train`, and the first of `val`, `valid`, `validation`, `test` and the like.

    Capitals do not matter. Names with more around them (`train_images`) count where all folders have such
    names and hold folders alone, so that they cannot be classes.

    Args:
        folder: where to look.
        test_folder: name of the folder to test on, where somebody says it.

    Raises:
        UserError: that is not there, or there is a folder to test on and none to train on.
    """
    kinds = kinds_of(folder)
    train = next((kinds[kind] for kind in TRAIN_NAMES if kind in kinds), None)
    tests = [kinds[kind] for kind in TEST_NAMES if kind in kinds]
    if test_folder is not None:
        if not (folder / test_folder).is_dir():
            raise UserError(f"data.test_folder='{test_folder}' is not a folder in '{folder}'")
        tests = [test_folder]
    elif train is None:
        tests = [name for name in tests if name in USUAL_TEST_NAMES]
    if tests and train is None:
        raise UserError(f"'{folder}' has a folder '{tests[0]}' but none named 'train'")
    notes: list[str] = []
    if len(tests) > 1:
        notes.append(f"tested on '{tests[0]}', not on {quoted(tests[1:])}: data.test_folder chooses")
    others = [name for name in inside(folder) if name != train]
    if train is not None and not tests and others:
        notes.append(f"beside '{train}', {quoted(others)} is not used: data.test_folder=NAME tests on it")
    return Splits(train, tests[0] if tests else None, tuple(notes))


def kinds_of(folder: Path) -> dict[str, str]:
    """Folders in a folder by their names in lower case; by the word in it where all are such of splits."""
    names = inside(folder)
    found = {name.lower(): name for name in names}
    found |= {name: name for name in names}
    words = [_WORD.search(name.lower()) for name in names]
    if not found.keys() & {*TRAIN_NAMES, *TEST_NAMES} and all(words):
        kinds = {word[1]: name for word, name in zip(words, names, strict=True) if word}
        if len(kinds) == len(names) and all(_of_folders(folder / name) for name in names):
            return kinds
    return found


def _of_folders(place: Path) -> bool:
    """Whether a folder holds folders and nothing else."""
    with os.scandir(place) as entries:
        kinds = [entry.is_dir() for entry in entries if entry.name[0] != "." and entry.name not in SYSTEM]
    return bool(kinds) and all(kinds)


def inside(folder: Path) -> list[str]:
    """Names of the folders in a folder, those of the system left out."""
    with os.scandir(folder) as entries:
        found = [e.name for e in entries if e.name[0] != "." and e.name not in SYSTEM and e.is_dir()]
    return sorted(found)


def innermost(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder itself, or where archives hold one folder around their content, that one; and a note then.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     Path(place, "photos", "train").mkdir(parents=True)
    ...     innermost(Path(place))[0].name
    'photos'
    """
    start = folder
    while _of_folders(folder) and len(names := inside(folder)) == 1:
        if _WORD.search(names[0].lower()) or not inside(folder / names[0]):
            break
        folder = folder / names[0]
    return folder, (f"'{start}' holds one folder alone: '{folder}' is taken",) * (folder != start)
