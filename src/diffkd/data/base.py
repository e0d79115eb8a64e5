"""What a data set is, and how one is found by its name and built."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from diffkd.batch import Batch
from diffkd.errors import UserError, told
from diffkd.names import check_kind, is_path, load_object, load_submodule, options_of, submodules
from diffkd.pictures.files import IMAGENET_MEAN, IMAGENET_STD, Part, Source, shared_files
from diffkd.pictures.held import can_renumber, classes_in, hold_out_samples, part_of, renumbered
from diffkd.pictures.loading import BatchedSplit as BatchedSplit
from diffkd.pictures.loading import Loader as Loader
from diffkd.pictures.loading import Samples as Samples
from diffkd.pictures.loading import Split as Split
from diffkd.pictures.loading import Streamed as Streamed
from diffkd.pictures.memory import ArraySplit, channel_statistics, some
from diffkd.pictures.options import natural_key, quoted
from diffkd.pictures.streams import StreamedPictures
from diffkd.pictures.unlabelled import seen_alike, unlabelled_files
from diffkd.pictures.view import TestView

if TYPE_CHECKING:  # it brings timm and torchvision, which arrays do without
    from diffkd.pictures.augment import PictureOptions

VAL_FRACTION = 0.1  # held out of the training samples where a choice needs some and no share is said


@dataclass(frozen=True)
class Data:
    """A data set ready to train on. Whoever builds it may keep it: nothing changes it.

    Attributes:
        train, test: the two splits; the train split augments, the test split does not.
        num_classes: None where the task has no classes.
        image_shape: `(C, H, W)` of an image, or of a typical one where sizes differ.
        mean, std: per channel, on the scale 0 to 1, of the training images.
        class_names: in the order of the class indices, or empty.
        view: how a picture file becomes a test image; None resizes it to `image_shape`, or keeps it where
            the task works on whole pictures.
        collate: makes a Batch of a list of samples; None stacks images and targets.
        notes: what was decided for the user (a held-out share, a folder chosen), one line each.
        val: samples to choose on (epochs, settings), seen as test ones are; None where there are none.
        test_held_out: the test split is a part of the training data, for there was no other.
        class_weights: of each class in the loss; empty for 1 each.
        unlabelled: samples without labels that methods learn from beside `train`, seen as those are: images
            alone, or with targets of `diffkd.batch.UNLABELLED` throughout; None where there are none.
    """

    train: Split
    test: Split
    num_classes: int | None
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    class_names: tuple[str, ...] = ()
    view: TestView | None = None
    collate: Callable[[list[Any]], Batch] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    val: Split | None = None
    test_held_out: bool = False
    class_weights: tuple[float, ...] = ()
    unlabelled: Split | None = None

    def with_validation(self, fraction: float) -> "Data":
        """The same with a share of the training samples (of every class, where known) held out as `val`.

        Raises:
            UserError: there are too few.

        >>> import torch
        >>> split = ArraySplit(torch.zeros(20, 1, 8, 8), torch.arange(20) % 2)
        >>> held = Data(split, split, 2, (1, 8, 8)).with_validation(0.2)
        >>> len(held.train), len(held.val), held.notes
        (16, 4, ('4 of 20 training samples held out for validation',))
        """
        train, val, notes = hold_out_samples(self.train, fraction)
        return replace(self, train=train, val=val, notes=self.notes + notes)

    def on_validation(self) -> "Data":
        """The same with `val` in the place of the test split, which is gone: to choose settings."""
        assert self.val is not None
        note = "the validation samples stand for the test samples, which are not used"
        return replace(self, test=self.val, val=None, notes=(*self.notes, note))

    @property
    def takes_order(self) -> bool:
        """Whether its classes can be numbered in another order."""
        splits = (self.train, self.test, self.val)
        return all(split is None or can_renumber(split) for split in splits)

    def in_class_order(self, order: Sequence[str]) -> "Data":
        """The same with its classes numbered in another order.

        Args:
            order: all their names.

        Raises:
            UserError: it does not name each class once, or the data set cannot be renumbered.

        >>> import torch
        >>> split = ArraySplit(torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 1]))
        >>> data = Data(split, split, 2, (1, 8, 8), class_names=("cat", "dog"))
        >>> data.in_class_order(["dog", "cat"]).train.targets
        tensor([1, 0, 0])
        """
        if sorted(order) != sorted(self.class_names):
            known = quoted(list(self.class_names)) if self.class_names else "none has a name"
            raise UserError(f"data.class_order must name each class once; the classes: {known}")
        places = np.array([list(order).index(name) for name in self.class_names], np.int64)
        train, test = (renumbered(split, places) for split in (self.train, self.test))
        val = None if self.val is None else renumbered(self.val, places)
        return replace(self, train=train, test=test, val=val, class_names=tuple(order))

    def limited(self, limit: float) -> "Data":
        """The same with fewer training samples, always the same, of every class alike where known.

        Args:
            limit: how many, or their share below 1.

        >>> import torch
        >>> split = ArraySplit(torch.zeros(20, 1, 8, 8), torch.arange(20) % 2)
        >>> len(Data(split, split, 2, (1, 8, 8)).limited(0.2).train)
        4
        """
        count = len(self.train)
        number = max(round(limit * count), 1) if limit < 1 else int(limit)
        if number >= count:
            return self
        if isinstance(self.train, StreamedPictures):
            note = f"data.limit: the first {number:,} of {count:,} training samples are used"
            return replace(self, train=self.train.first(number), notes=(*self.notes, note))
        kept = some(count, number, classes_in(self.train))
        note = f"data.limit: {len(kept):,} of {count:,} training samples are used"
        return replace(self, train=part_of(self.train, kept, training=True), notes=(*self.notes, note))

    def weighted(self, weights: Literal["balanced"] | Sequence[float]) -> "Data":
        """The same with a weight for each class in the loss.

        Args:
            weights: one a class; or "balanced": N / (K * n) for a class of n of the N samples.

        Raises:
            UserError: the classes are not known, or there are more or fewer than weights.

        >>> import torch
        >>> split = ArraySplit(torch.zeros(4, 1, 8, 8), torch.tensor([0, 0, 0, 1]))
        >>> Data(split, split, 2, (1, 8, 8)).weighted("balanced").class_weights
        (0.6666666666666666, 2.0)
        """
        count = self.num_classes or 0
        if weights != "balanced":
            if len(weights) != count:
                raise UserError(f"data.class_weights has {len(weights)} weights for {count} classes")
            return replace(self, class_weights=tuple(map(float, weights)))
        labels = classes_in(self.train)
        if labels is None:
            raise UserError(
                "data.class_weights=balanced: the samples' classes are not listed; give a weight each"
            )
        found = np.bincount(labels[(labels >= 0) & (labels < count)], minlength=count)
        shares = found.sum() / (count * np.maximum(found, 1))
        told = ", ".join(f"{name} {weight:.3g}" for name, weight in _named(self, np.where(found, shares, 0)))
        return replace(
            self,
            class_weights=tuple(np.where(found, shares, 0.0).tolist()),
            notes=(*self.notes, f"weights of classes in the loss: {told}"),
        )

    def with_unlabelled(self, folder: str) -> "Data":
        """The same with all pictures beneath a folder to distil from, whatever is on them.

        Raises:
            UserError: there are none, or the data set cannot see them as its own.
        """
        files, notes = unlabelled_files(folder)
        notes += shared_files(files, getattr(self.test, "source", None))
        return replace(self, unlabelled=seen_alike(self.train, files), notes=self.notes + notes)

    @property
    def summary(self) -> str:
        """How much there is, in a line.

        >>> Data(range(1800), range(360), 12, (3, 8, 8)).summary
        '12 classes, 1,800 + 360 pictures'
        """
        classes = "" if self.num_classes is None else f"{self.num_classes} classes, "
        if self.unlabelled is not None:
            both = f"{len(self.train):,} labelled + {len(self.unlabelled):,} unlabelled"
            return f"{classes}{both} + {len(self.test):,} test pictures"
        return f"{classes}{len(self.train):,} + {len(self.test):,} pictures"


def _named(data: Data, values: Iterable[float], most: int = 10) -> list[tuple[str, float]]:
    """The first values with their classes' names."""
    names = data.class_names or tuple(map(str, range(data.num_classes or 0)))
    return list(islice(zip(names, values, strict=True), most))


def of_pictures(
    options: "PictureOptions",
    train: Source,
    test: Source,
    *,
    num_classes: int,
    class_names: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Data:
    """A data set of pictures that are read one by one, or kept in memory where they are small.

    Args:
        options: how they are seen.
        train: where those to train on come from.
        test: where those to test on do.
        num_classes: as in `Data`.
        class_names: as in `Data`.
        notes: as in `Data`; what is decided here is added.
    """
    looked = options.look_over(train, test)
    levels, size = looked.levels, options.kept_size(looked, len(train))
    found = Data(
        *options.splits(train, test, levels),
        num_classes=num_classes,
        image_shape=options.image_shape,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        class_names=class_names,
        view=replace(options.view, levels=levels),
        notes=notes + looked.notes + shared_files(train, test),
        test_held_out=isinstance(train, Part) and isinstance(test, Part) and train.source is test.source,
    )
    if size is None:
        return replace(found, notes=found.notes + options.enlarged(looked))
    images, targets = options.read(train, levels)
    mean, std = channel_statistics(images)
    padding = max(min(size) // 8, 1) if options.crop_padding is None else options.crop_padding
    note = (
        f"all pictures are {size[0]}x{size[1]}: kept in memory at that size, with crop_padding={padding} and "
        "their own mean and std; data.image_size=224 enlarges them",
    )
    return replace(
        found,
        train=ArraySplit(
            images, targets, crop_padding=padding, flip=options.flip, cutout=options.cutout, fill=mean
        ),
        test=ArraySplit(*options.read(test, levels)),
        image_shape=(3, *size),
        view=TestView("resize", size, levels=levels),
        mean=mean,
        std=std,
        notes=found.notes + note,
    )


def builder(name: str) -> Callable[..., Data]:
    """The function that makes a data set: `build(root, *, option=...) -> Data`.

    `name` is a file of this package (`digits`), one of its data sets (`torchvision/Food101` is
    `torchvision` with `dataset: Food101`), or `my_package.my_module:build`.

    Raises:
        UserError: nothing has that name; the nearest names are given.
    """
    if is_path(name):
        found = load_object(name)
        what = "a function `build(root, *, option=...)` that gives a diffkd.Data"
        check_kind(name, found, what)
        needed = [p for p in _positional(found)[1:] if p.default is p.empty]
        if needed:
            raise UserError(
                f"'{name}' is not {what}: its argument '{needed[0].name}' needs a default behind a `*`"
            )
        return found  # type: ignore[no-any-return]
    source, slash, dataset = name.partition("/")
    build = load_submodule("diffkd.data", source, "data set").build
    if not slash:
        return build  # type: ignore[no-any-return]
    if "dataset" not in options_of(build):
        raise UserError(f"data '{source}' is one data set: leave out '/{dataset}'")
    return partial(build, dataset=dataset)


def _positional(function: Callable[..., Any]) -> list[inspect.Parameter]:
    takes = inspect.signature(function).parameters.values()
    return [p for p in takes if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]


def _built_outside(name: str, root: str | None, options: dict[str, Any]) -> Data:
    """A data set of the user's own code; one that needs no root need not take one."""
    function = builder(name)
    takes_root = bool(_positional(function))
    if root is not None and not takes_root:
        raise UserError(f"'{name}' takes no data.root: let its first argument be the root, or leave it out")
    try:
        found = function(*([root] * takes_root), **options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"data '{name}' cannot be built: {told(error)}") from error
    if not isinstance(found, Data):
        raise UserError(f"data '{name}' gave a {type(found).__name__}, not a diffkd.Data")
    return found


_kept: ContextVar[dict[str, Data] | None] = ContextVar("_kept", default=None)


@contextmanager
def data_kept() -> Iterator[None]:
    """Within, `build` reads a data set once: several runs of one command share it.

    Not one of the user's own, for its code may change what it holds while a run goes on.

    >>> with data_kept():
    ...     build("digits", None, {}) is build("digits", None, {})
    True
    """
    token = _kept.set({} if _kept.get() is None else _kept.get())
    try:
        yield
    finally:
        _kept.reset(token)


def build(
    name: str,
    root: str | None,
    options: dict[str, Any],
    *,
    val_fraction: float | None = None,
    test_on: Literal["test", "val"] = "test",
    limit: float | None = None,
    class_weights: Literal["balanced"] | Sequence[float] | None = None,
    unlabelled: str | None = None,
    class_order: list[str] | Literal["name", "natural"] | None = None,
) -> Data:
    """The data set of a name, a root and options, as `builder` finds it.

    Args:
        name: see `builder`.
        root: its first argument.
        options: its keywords.
        val_fraction: share of the training samples held out: as the test split where there is none, else
            as `Data.val`, unless the data set says that itself.
        test_on: "val" puts what is held out, a tenth if not said, in the test split's place.
        limit: how many training samples are used, or their share below 1; None for all.
        class_weights: see `Data.weighted`.
        unlabelled: see `Data.with_unlabelled`.
        class_order: how classes are numbered: by all their names in order, by the alphabet, or by that with
            numbers in names counting as such; None is the data set's own way.

    Raises:
        UserError: it cannot be built.
    """
    own = "val_fraction" in options_of(builder(name))
    if own and val_fraction is not None:
        options = options | {"val_fraction": val_fraction}
    ordered = "class_order" in options_of(builder(name))
    if class_order is not None and ordered:
        options = options | {"class_order": class_order}
    data = _built(name, root, options)
    if class_order is not None and not ordered:
        if isinstance(class_order, str):
            class_order = sorted(data.class_names, key=natural_key if class_order == "natural" else str)
        data = data.in_class_order(class_order)
    if data.val is not None and val_fraction is not None and not own:
        note = "the data set has validation samples of its own: data.val_fraction is not used"
        data = replace(data, notes=(*data.notes, note))
    served = data.test_held_out or (own and is_path(name))
    if data.val is None and (test_on == "val" or (val_fraction is not None and not served)):
        data = data.with_validation(val_fraction or VAL_FRACTION)
    data = data.on_validation() if test_on == "val" else data
    data = data if limit is None else data.limited(limit)
    data = data if class_weights is None else data.weighted(class_weights)
    return data if unlabelled is None else data.with_unlabelled(unlabelled)


def _built(name: str, root: str | None, options: dict[str, Any]) -> Data:
    if is_path(name):
        return _built_outside(name, root, options)
    kept = _kept.get()
    if kept is None:
        return builder(name)(root, **options)
    key = repr((name, root, sorted(options.items())))
    if key not in kept:
        kept.clear()  # one at a time: a data set may fill the memory
        kept[key] = builder(name)(root, **options)
    return kept[key]


def names() -> list[str]:
    """Names of the data sets at hand."""
    return submodules("diffkd.data")
