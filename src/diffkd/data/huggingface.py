"""Data sets of the Hugging Face Hub, or a local one, through the `datasets` library (an extra)."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffkd.data.base import Data, of_pictures
from diffkd.errors import UserError, first_line, nearest
from diffkd.pictures.augment import PictureOptions
from diffkd.pictures.files import Item, Source, held_out
from diffkd.pictures.options import class_count, class_notes, spread

_TEST_NAMES = ("validation", "valid", "val", "test")


@spread(PictureOptions)
def build(
    root: str | None,
    *,
    dataset: str | None = None,
    subset: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    val_fraction: float = 0.1,
    labels: Literal["given", "none"] = "given",
    num_classes: int | None = None,
    first_label: int = 0,
    options: PictureOptions,
) -> Data:
    """Pictures and labels of a data set that `datasets.load_dataset` opens. None of its code is run.

    Args:
        root: folder of a local data set; with `dataset`, the folder to keep downloads in.
        dataset: name on the Hub, such as "ethz/food101".
        subset: name of its configuration, where it has several.
        train_split: name of the split to train on.
        test_split: name of the split to test on; the first of validation, valid, val and test that
            is there if not given, else a share is held out.
        image_column: name of the column of pictures; the only such if not given.
        label_column: name of the column of class indices; the only one with names of classes if not given.
        val_fraction: share held out, of every class.
        labels: "none" trains without labels; the test split keeps those that it has.
        num_classes: needed where the data set does not tell.
        first_label: the number of the first class, where labels have no names.
        options: how pictures are augmented.

    Raises:
        UserError: the library is not installed, or the data set, a split or a column is not there.
    """
    name = dataset or root
    if name is None:
        raise UserError("data 'huggingface' needs data.dataset=NAME, or data.root=FOLDER of a local one")
    splits = _load(name, subset, root if dataset else None)
    rows = _split(splits, train_split, name)
    image = image_column or _only_column(rows, "Image")
    label = label_column or _only_column(rows, "ClassLabel")
    if image is None or (label is None and labels == "given"):
        option = "image_column" if image is None else "label_column"
        raise UserError(f"which column of '{name}' is it? data.{option}= one of {', '.join(rows.features)}")
    held = test_split or next((split for split in _TEST_NAMES if split in splits), None)
    found = _Rows(rows, image, None if labels == "none" else label, f"{name} {train_split}", first_label)
    known = {found.name: found.targets}
    train: Source = found
    test: Source
    notes: tuple[str, ...] = ()
    if held is None:
        train, test, notes = held_out(found, found.targets, val_fraction, name)
        seen = None if found.targets is None else found.targets[test.places]
    else:
        test = tested = _Rows(_split(splits, held, name), image, label, f"{name} {held}", first_label)
        known[tested.name] = seen = tested.targets
    classes = tuple(getattr(rows.features.get(label), "names", None) or ())
    count = class_count(num_classes, classes, known)
    notes += class_notes(count, found.targets, seen, classes)
    return of_pictures(
        options,
        train,
        test,
        num_classes=count,
        class_names=classes,
        notes=notes,
    )


def _load(name: str, subset: str | None, keep_in: str | None) -> Mapping[str, Any]:
    """Every split of a data set."""
    try:
        library = import_module("datasets")
    except ImportError as error:
        raise UserError("data 'huggingface' needs a library: pip install 'diffkd[huggingface]'") from error
    try:
        return library.load_dataset(name, subset, cache_dir=keep_in)  # type: ignore[no-any-return]
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"data set '{name}' cannot be loaded: {reason}") from error


def _split(splits: Mapping[str, Any], split: str, name: str) -> Any:
    if split not in splits:
        raise UserError(f"data set '{name}' has no split '{split}'{nearest(split, splits)}")
    return splits[split]


def _only_column(rows: Any, kind: str) -> str | None:
    """The column of a kind of feature, if there is exactly one."""
    found = [column for column, feature in rows.features.items() if type(feature).__name__ == kind]
    return found[0] if len(found) == 1 else None


class _Rows:
    """One split, its pictures not decoded yet."""

    def __init__(self, rows: Any, image: str, label: str | None, name: str, first: int) -> None:
        for column in filter(None, (image, label)):
            if column not in rows.features:
                raise UserError(f"{name} has no column '{column}'{nearest(column, rows.features)}")
        self.rows, self.image, self.name = (
            rows.cast_column(image, import_module("datasets").Image(decode=False)),
            image,
            name,
        )
        self.targets = None if label is None else np.asarray(rows[label])
        if self.targets is not None and self.targets.dtype.kind in "iu":
            self.targets = self.targets.astype(np.int64) - first
        if self.targets is not None and not (self.targets.dtype.kind in "iu" and self.targets.min() >= 0):
            raise UserError(f"column '{label}' of {name} holds no class indices of {first} or more")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        stored = self.rows[index][self.image]
        picture = stored["bytes"] if stored["bytes"] is not None else Path(stored["path"])
        target = None if self.targets is None else int(self.targets[index])
        return Item(f"{self.name} {index}", picture, target)
