"""Data sets of the Hugging Face Hub, or a local one, through the `datasets` library (an extra)."""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffkd.data.base import Data, of_pictures
from diffkd.errors import UserError, first_line, nearest
from diffkd.pictures.augment import PictureOptions
from diffkd.pictures.files import Item, Pictures, Source, held_out
from diffkd.pictures.options import class_count, class_notes, quoted, spread
from diffkd.pictures.streams import Held, StreamedPictures, drawn, interleaved

_TEST_NAMES = ("validation", "valid", "val", "test")
_LABELS = (
    "label",
    "labels",
    "class",
    "target",
)  # columns of class indices or names, where none is marked as such


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
    streaming: bool = False,
    train_size: int | None = None,
    shuffle_buffer: int = 1000,
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
        streaming: reads the training rows one after the other where they lie, for what does not fit the disks
            here; each process reads all. The test split is held in memory, as it is stored.
        train_size: rows of an epoch of a stream, where the data set does not say how many there are.
        shuffle_buffer: rows of a stream among which the next is drawn; eight files, in a random order, are
            read side by side besides.
        options: how pictures are augmented.

    Raises:
        UserError: the library is not installed, or the data set, a split or a column is not there.
    """
    name = dataset or root
    if name is None:
        raise UserError("data 'huggingface' needs data.dataset=NAME, or data.root=FOLDER of a local one")
    splits = _load(name, subset, root if dataset else None, streaming)
    rows = _split(splits, train_split, name)
    image = image_column or _only_column(rows, "Image")
    label = label_column or _only_column(rows, "ClassLabel")
    label = label or next((column for column in _LABELS if column in rows.features), None)
    if image is None or (label is None and labels == "given"):
        option = "image_column" if image is None else "label_column"
        raise UserError(f"which column of '{name}' is it? data.{option}= one of {', '.join(rows.features)}")
    held = test_split or next((split for split in _TEST_NAMES if split in splits), None)
    if streaming:
        columns = {train_split: None if labels == "none" else label} | ({held: label} if held else {})
        streams = [
            _Stream(
                _split(splits, split, name), image, column, f"{name} {split}", first_label, shuffle_buffer
            )
            for split, column in columns.items()
        ]
        return _streamed(streams, options, num_classes, train_size)
    found = _Rows(rows, image, None if labels == "none" else label, f"{name} {train_split}", first_label)
    known = {found.name: found.targets}
    train: Source = found
    test: Source
    notes: tuple[str, ...] = ()
    if held is None:
        train, test, notes = held_out(found, found.targets, val_fraction, name)
        seen = None if found.targets is None else found.targets[test.places]
    else:
        there = _split(splits, held, name)
        test = tested = _Rows(there, image, label, f"{name} {held}", first_label, found.classes)
        known[tested.name] = seen = tested.targets
    classes = tuple(getattr(rows.features.get(label), "names", None) or found.classes)
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


def _streamed(
    streams: list["_Stream"], options: PictureOptions, num_classes: int | None, train_size: int | None
) -> Data:
    """Training pictures that are read as they come, and test pictures in memory."""
    train = streams[0]
    if len(streams) == 1:
        raise UserError(
            f"data.streaming: '{train.name}' has no test split beside it, and nothing can be held out of a "
            "stream: data.test_split=NAME"
        )
    if options.max_corrupt:
        raise UserError("data.streaming reads a picture when it comes: leave out data.max_corrupt")
    count = train_size or train.count
    if count is None:
        raise UserError(f"'{train.name}' does not say how many rows it has: data.train_size=N")
    held = Held(streams[1].name, streams[1].items(None))
    if not len(held):
        raise UserError(f"'{held.name}' has no rows")
    classes = train.classes or streams[1].classes
    told = (
        f"'{train.name}' is streamed; the {len(held):,} test pictures are in memory "
        f"({held.content.nbytes / 2**20:,.1f} MB)",
        *options.enlarged(options.look_over(held, held)),
    )
    found = of_pictures(
        replace(options, image_size=options.size),  # small ones, too, are seen one by one
        held,
        held,
        num_classes=class_count(num_classes, classes, {held.name: held.targets}),
        class_names=classes,
        notes=told,
    )
    assert isinstance(found.train, Pictures)
    return replace(found, train=StreamedPictures(train, count, found.train))


def _load(name: str, subset: str | None, keep_in: str | None, streaming: bool) -> Mapping[str, Any]:
    """Every split of a data set."""
    try:
        library = import_module("datasets")
    except ImportError as error:
        raise UserError("data 'huggingface' needs a library: pip install 'diffkd[huggingface]'") from error
    try:
        more = {"streaming": True} if streaming else {}
        return library.load_dataset(name, subset, cache_dir=keep_in, **more)  # type: ignore[no-any-return]
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"data set '{name}' cannot be loaded: {reason}") from error


def _split(splits: Mapping[str, Any], split: str, name: str) -> Any:
    if split not in splits:
        raise UserError(f"data set '{name}' has no split '{split}'{nearest(split, splits)}")
    rows = splits[split]
    if rows.features is None and hasattr(rows, "_resolve_features"):  # of a stream: its first rows tell
        rows = rows._resolve_features()
    return rows


def _only_column(rows: Any, kind: str) -> str | None:
    """The column of a kind of feature, if there is exactly one."""
    found = [column for column, feature in rows.features.items() if type(feature).__name__ == kind]
    return found[0] if len(found) == 1 else None


class _Rows:
    """One split, its pictures not decoded yet.

    Attributes:
        classes: names of the classes in the order of the alphabet, where labels are text; else empty.
    """

    def __init__(
        self,
        rows: Any,
        image: str,
        label: str | None,
        name: str,
        first: int,
        classes: Sequence[str] = (),
    ) -> None:
        for column in filter(None, (image, label)):
            if column not in rows.features:
                raise UserError(f"{name} has no column '{column}'{nearest(column, rows.features)}")
        self.rows, self.image, self.name = (
            rows.cast_column(image, import_module("datasets").Image(decode=False)),
            image,
            name,
        )
        self.classes = tuple(classes)
        self.targets = None if label is None else self._indices(list(rows[label]), label, first)

    def _indices(self, values: list[Any], label: str, first: int) -> np.ndarray:
        """Class indices `(N,)` of a column's numbers or names.

        Raises:
            UserError: it holds neither.
        """
        where = f"column '{label}' of {self.name}"
        if all(isinstance(value, str) for value in values):
            self.classes = self.classes or tuple(sorted(set(values)))
            number = {name: i for i, name in enumerate(self.classes)}
            unknown = sorted(set(values) - number.keys())
            if unknown:
                raise UserError(f"{where} holds classes that the training rows lack: {quoted(unknown)}")
            return np.array([number[value] for value in values], np.int64)
        if any(isinstance(value, list) for value in values):
            raise UserError(f"{where} holds lists, where a class index belongs")
        targets = np.asarray(values)
        if targets.dtype.kind not in "iu" or targets.astype(np.int64).min(initial=first) < first:
            raise UserError(
                f"{where} holds no class indices of {first} or more; data.first_label, or mend it"
            )
        return targets.astype(np.int64) - first

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        target = None if self.targets is None else int(self.targets[index])
        name = f"{self.name} {index}"
        return Item(name, _stored(self.rows[index][self.image], name), target)


def _stored(picture: Mapping[str, Any] | None, name: str) -> bytes | Path:
    """The content of a picture, or its file.

    Raises:
        UserError: there is none.
    """
    if picture is None:
        raise UserError(f"cannot read picture '{name}': the row has none")
    return picture["bytes"] if picture["bytes"] is not None else Path(picture["path"])


class _Stream:
    """One split, read as it comes."""

    def __init__(self, rows: Any, image: str, label: str | None, name: str, first: int, buffer: int) -> None:
        if buffer < 1:
            raise UserError(f"data.shuffle_buffer={buffer} must be 1 or more")
        told = (rows.info.splits or {}).get(rows.split) if rows.info else None
        self.count: int | None = getattr(told, "num_examples", None) or None
        self.classes = tuple(getattr(rows.features.get(label), "names", None) or ())
        self.rows = rows.cast_column(image, import_module("datasets").Image(decode=False))
        self.image, self.label, self.name, self.files = image, label, name, self.rows.num_shards
        self.first_label, self.buffer = 0 if self.classes else first, buffer

    def first(self, count: int) -> "_Stream":
        """The same of its first rows."""
        found = copy(self)
        found.rows, found.count, found.files = self.rows.take(count), count, 1
        return found

    def items(self, seed: int | None) -> Iterator[Item]:
        """Its pictures: several of its files under way, each drawn from the next `buffer` ones.

        Without a seed they come in their own order.
        """
        rows, count = iter(self.rows), 0
        if seed is not None:  # not by the library, whose ways of shuffling change
            random = np.random.default_rng(seed)
            order = random.permutation(self.files)
            parts = (self.rows.shard(self.files, int(i)) if self.files > 1 else self.rows for i in order)
            rows = drawn(interleaved(parts, random), self.buffer, random)
        try:
            for count, row in enumerate(rows, 1):
                target = None if self.label is None else self._target(row[self.label], count)
                name = f"{self.name} row {count}"
                yield Item(name, _stored(row[self.image], name), target)
        except UserError:
            raise
        except Exception as error:
            reason = first_line(error)
            raise UserError(f"'{self.name}' cannot be read after {count:,} rows: {reason}") from error

    def _target(self, label: Any, row: int) -> int:
        target = label - self.first_label if isinstance(label, int) and not isinstance(label, bool) else -1
        if target < 0:
            raise UserError(
                f"row {row} of {self.name} has '{str(label)[:40]}' for a label, no class index of "
                f"{self.first_label} or more"
            )
        return target
