"""Pictures in tar files, as the webdataset library writes them: read in place, never unpacked."""

import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Literal

from diffkd.data.base import Data, of_pictures
from diffkd.errors import UserError
from diffkd.pictures.augment import PictureOptions
from diffkd.pictures.files import Source, held_out
from diffkd.pictures.options import class_count, class_notes, quoted, spread
from diffkd.pictures.shards import Endings, Shards, first_endings
from diffkd.pictures.splits import USUAL_TEST_NAMES


@spread(PictureOptions)
def build(
    root: str | None,
    *,
    test: str | None = None,
    image_ending: str = "",
    label_ending: str = "",
    label_field: str = "",
    first_label: int = 0,
    val_fraction: float = 0.1,
    labels: Literal["given", "none"] = "given",
    num_classes: int | None = None,
    options: PictureOptions,
) -> Data:
    """Tar files (shards) whose members `cat/7.jpg` and `cat/7.cls` are a sample, read where they lie.

    Their members are found once, and where that took a while kept in the cache: after that every picture is
    read alone, in any order, so that epochs are shuffled whole and runs resume as with files. Shards lie on a
    disk that is mounted here, and are not compressed. Labels that are all whole numbers are class indices;
    others are names of classes, numbered in the order of the alphabet.

    Args:
        root: the shards to train on, `shards/train-{000..009}.tar` or `shards/train-*.tar`; or a folder with
            `train*.tar` and one of `val*.tar`, `valid*.tar`, `validation*.tar`, `test*.tar`, or folders of
            these names; of another folder, all shards are trained on.
        test: those to test on where `root` does not say, likewise, within its folder.
        image_ending: what pictures' names end with after the first dot, such as `jpg`; the only ending of a
            picture if not given.
        label_ending: what labels' names end with: `cls` or else `json` if not given; others (`txt`) hold the
            label as text.
        label_field: key of the label in JSON; the first of `label`, `cls`, `class`, `class_name` and
            `target` that is there if not given.
        first_label: the number of the first class, where labels are numbers.
        val_fraction: share of every class to test on where there are no shards to test on.
        labels: "none" trains without labels; the test shards keep those that they have.
        num_classes: needed without labels; else checked, but may exceed the highest class index.
        options: how pictures are augmented.

    Raises:
        UserError: a shard is missing, damaged or compressed, or a label wrong; it is named.
    """
    given = labels == "given"
    places = _splits(root, test)
    found = [Shards(places[0], _endings(places[0][0], image_ending, label_ending, label_field, given, given))]
    if places[1]:
        endings = _endings(places[1][0], image_ending, label_ending, label_field, True, given)
        found.append(Shards(places[1], endings))
    classes, count = _number(found, num_classes, first_label)
    notes = tuple(note for shards in found for note in shards.notes())
    train: Source = found[0]
    held: Source = found[-1]
    if len(found) == 1:
        train, held, note = held_out(train, found[0].targets, val_fraction, str(root))
        notes += note
    tested = found[1].targets if len(found) > 1 else None
    notes += class_notes(count, found[0].targets, tested, classes)
    return of_pictures(options, train, held, num_classes=count, class_names=classes, notes=notes)


def _endings(place: Path, image: str, label: str, field: str, wanted: bool, needed: bool) -> Endings:
    """Which members are picture and label, as a shard's first samples show it."""
    there = first_endings(place) if wanted and not label else {label}
    found = label or next((ending for ending in ("cls", "json") if ending in there), "")
    if needed and not found:
        raise UserError(
            f"no label (.cls, .json) beside the pictures of '{place}', where names end with "
            f"{quoted(sorted(there), 6)}: data.label_ending=ENDING, or data.labels=none"
        )
    return Endings(image, found if wanted else "", field)


def _number(
    found: Sequence[Shards], num_classes: int | None, first_label: int
) -> tuple[tuple[str, ...], int]:
    """Gives the samples their class indices; the classes' names if they have any, and their number."""
    every = [label for shards in found for label in shards.labels]
    classes: tuple[str, ...] = ()
    if all(label.removeprefix("-").isdecimal() for label in every):
        known = {label: int(label) - first_label for label in every}
    else:
        classes = tuple(sorted(found[0].labels or found[-1].labels))
        known = {name: index for index, name in enumerate(classes)}
    for shards in found:
        shards.number(known)
    labels = {f"'{shards.shards[0]}'": shards.targets for shards in found}
    return classes, class_count(num_classes, classes, labels)


def _splits(root: str | None, test: str | None) -> tuple[list[Path], list[Path]]:
    """Shards to train on, and those to test on, none where there are none."""
    if root is None:
        raise UserError("data 'webdataset' needs to know its shards: data.root='shards/train-{000..009}.tar'")
    if remote := re.search(r"(https?|s3|gs|hf|pipe):", f"{root} {test or ''}"):
        raise UserError(
            f"data 'webdataset' reads shards of a disk that is mounted here, not {remote[0]}; download them, "
            "or stream a data set of the Hub: data=huggingface data.streaming=true"
        )
    folder, held = Path(root).expanduser(), list[Path]()
    if folder.is_dir():
        train = _named(folder, "train")
        if train and test is None:
            held = next((found for name in USUAL_TEST_NAMES if (found := _named(folder, name))), [])
        train = train or sorted(folder.glob("*.tar"))
        if not train:
            raise UserError(f"no shards (.tar) in '{folder}'")
    else:
        train = list(_expanded(folder))
        folder = folder.parent
    held = held if test is None else list(_expanded(folder / Path(test).expanduser()))
    if shared := set(train) & set(held):
        raise UserError(f"'{min(shared)}' is to train on and to test on; name other shards: data.test")
    return train, held


def _named(folder: Path, split: str) -> list[Path]:
    return sorted([*folder.glob(f"{split}*.tar"), *folder.glob(f"{split}/*.tar")])


def _expanded(pattern: Path) -> Iterator[Path]:
    """The files that a pattern means: `{000..009}` and `{a,b}` name each, `*`, `?`, `[ab]` what is there."""
    parts = re.split(r"\{([^{}]*)\}", str(pattern))
    choices = [_choices(part) if place % 2 else [part] for place, part in enumerate(parts)]
    for words in product(*choices):
        place = Path("".join(words))
        found = sorted(place.parent.glob(place.name)) if re.search(r"[*?[]", place.name) else [place]
        if not found or not found[0].is_file():
            raise UserError(f"no shard '{place}'")
        yield from found


def _choices(inside: str) -> list[str]:
    """What stands for `{...}`.

    >>> _choices("08..10"), _choices("a,b")
    (['08', '09', '10'], ['a', 'b'])
    """
    if not (numbers := re.fullmatch(r"([0-9]+)\.\.([0-9]+)", inside)):
        return inside.split(",")
    width = len(numbers[1])
    return [f"{number:0{width}}" for number in range(int(numbers[1]), int(numbers[2]) + 1)]
