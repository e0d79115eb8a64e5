"""Pictures with masks: paired by name, read, checked, counted."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as v2

from diffkd.batch import UNLABELLED, Batch
from diffkd.errors import UserError
from diffkd.pictures.count import Count, Masked, count
from diffkd.pictures.decoding import decode, loses, opened, unreadable
from diffkd.pictures.files import IMAGENET_MEAN, IMAGENET_STD, Item, Pictures, Source
from diffkd.pictures.joint import VOID, JointOptions, size_of
from diffkd.pictures.look import Placed, look_at_masks, look_over
from diffkd.pictures.options import quoted
from diffkd.pictures.scan import Scan
from diffkd.pictures.tables import ClassTable, Counts, colour_code, is_colour, settle
from diffkd.pictures.twins import shared_pictures
from diffkd.pictures.view import TestView

_LARGEST_CROP = 512  # pixels of a training view's side where nobody says another


class MaskFiles:
    """Picture files and mask files of the same names beneath two folders.

    Args:
        pictures: picture files.
        masks: mask files, one a picture, in the same order.
        coloured: the masks' colours tell the classes.
        notes: what the folders hold besides, one line each.
    """

    def __init__(
        self,
        pictures: Sequence[Path],
        masks: Sequence[Path],
        coloured: bool = False,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.notes = notes
        self.coloured, self.reads = coloured, "colours" if coloured else "values"
        # one block of bytes each: loader processes would copy a list of objects page by page
        self._pictures, self._masks = (
            np.array([os.fsencode(path) for path in paths], dtype=np.bytes_) for paths in (pictures, masks)
        )

    def __len__(self) -> int:
        return len(self._pictures)

    def picture(self, index: int) -> Path:
        """The picture's file."""
        return Path(os.fsdecode(bytes(self._pictures[index])))

    def place(self, index: int) -> str:
        """The mask's file."""
        return os.fsdecode(bytes(self._masks[index]))

    def file(self, index: int) -> Path:
        """The mask's file."""
        return Path(self.place(index))

    def codes(self, index: int) -> np.ndarray:
        """What the mask's file holds."""
        return read_mask(self.file(index), self.coloured)


class SomeMasked:
    """The pictures and masks of others at some places `(N,)`."""

    def __init__(self, source: Masked, places: np.ndarray) -> None:
        self.source, self.places = source, places
        self.reads, self.notes = source.reads, source.notes

    def __len__(self) -> int:
        return len(self.places)

    def picture(self, index: int) -> Path:
        """The picture's file."""
        return self.source.picture(int(self.places[index]))

    def place(self, index: int) -> str:
        """What an error calls the mask."""
        return self.source.place(int(self.places[index]))

    def file(self, index: int) -> Path:
        """The file that holds the mask."""
        return self.source.file(int(self.places[index]))

    def codes(self, index: int) -> np.ndarray:
        """What the mask holds."""
        return self.source.codes(int(self.places[index]))


def read_mask(place: Path, coloured: bool = False) -> np.ndarray:
    """The codes of a mask's file, `(H, W)` int64.

    Args:
        place: the file.
        coloured: its colours are the codes, those of its palette too; else its values are, or the indices
            of its palette. A colour picture has values where red, green and blue are alike everywhere.

    Raises:
        UserError: it cannot be read, is lossy as JPEGs are (which invents colours), or holds fractions.
    """
    try:
        with opened(place) as found:
            lossy, mode = loses(found, place), found.mode
            found = ImageOps.exif_transpose(found)
            many = coloured or mode in ("RGBA", "PA", "CMYK")
            values = np.asarray(found.convert("RGB") if many else found)
    except Exception as error:  # damaged files raise nearly anything
        raise unreadable(str(place), error, "mask") from error
    if lossy is not None:
        raise UserError(
            f"mask '{place}' is a {lossy}, which invents colours at every edge; save masks as PNG"
        )
    if values.dtype.kind == "f":
        raise UserError(f"mask '{place}' holds fractions; save it with 8 or 16 bits")
    values = values.astype(np.int64)
    if values.min(initial=0) < 0:
        raise UserError(f"mask '{place}' holds the value {values.min()}; masks hold 0 and more, 255 is void")
    if values.ndim == 2 or mode == "LA":
        return values if values.ndim == 2 else values[..., 0]
    red, green, blue = values[..., 0], values[..., 1], values[..., 2]
    if not coloured and (red == green).all() and (green == blue).all():
        return np.asarray(red)
    return np.asarray(colour_code(0, 0, 0) + (red << 16) + (green << 8) + blue)


def pair_up(pictures: Path, masks: Path, suffix: str = "", coloured: bool = False) -> MaskFiles:
    """Pairs the pictures and the masks beneath two folders by their names without ending.

    Args:
        pictures: the folder of pictures, with folders in it or not.
        masks: the folder of masks, of the same build.
        suffix: that the masks' names end with in addition.
        coloured: the masks' colours tell the classes.

    Raises:
        UserError: one is missing, or stands for two.
    """
    scans = Scan(pictures), Scan(masks)
    ours, theirs = map(_by_name, scans)
    notes = tuple(note for scan in scans for note in scan.notes())
    beside = "".join(f" ({note})" for note in notes)
    if not ours:
        raise UserError(f"no pictures in '{pictures}'{beside}")
    lonely = [path for name, path in ours.items() if name + suffix not in theirs]
    if len(lonely) == len(ours) and theirs:
        raise UserError(
            f"no mask has the name of its picture: '{lonely[0]}' and '{next(iter(theirs.values()))}', say; "
            "data.mask_suffix=TEXT says what masks' names end with"
        )
    if lonely:
        raise UserError(f"no mask in '{masks}' for {quoted([str(path) for path in lonely])}{beside}")
    spare = [path for name, path in theirs.items() if name.removesuffix(suffix) not in ours]
    if spare:
        shown = quoted([str(path) for path in spare])
        raise UserError(f"no picture in '{pictures}' for the mask {shown}{beside}")
    return MaskFiles(list(ours.values()), [theirs[name + suffix] for name in ours], coloured, notes)


def _by_name(scan: Scan) -> dict[str, Path]:
    """Picture files beneath a folder by their paths without ending, in order."""
    found: dict[str, Path] = {}
    for path in sorted(map(Path, scan.pictures())):
        # file systems and archives write an accent as its own letter or not
        name, place = normalize("NFC", path.with_suffix("").as_posix()), scan.folder / path
        if name in found:
            raise UserError(f"'{found[name]}' and '{place}' have one name: which is meant?")
        found[name] = place
    return found


class MaskedPictures(Pictures):
    """Map-style samples `(image (3, H, W) uint8, label map (H, W) int64)`, 255 for void.

    Args:
        source: the pictures and their masks.
        table: what the masks mean.
        view: changes picture and mask together, to train on; None leaves them, to test on.
        levels: see `decode`.
        max_corrupt: how many unreadable ones are put up with.
    """

    def __init__(
        self,
        source: Masked,
        table: ClassTable,
        view: Callable[[Any], Any] | None = None,
        levels: tuple[int, int] | None = None,
        max_corrupt: int = 0,
    ) -> None:
        kept: Any = {"leave_out": view is None, "levels": levels}
        super().__init__(source, view, max_corrupt, **kept)  # type: ignore[arg-type]
        self.masked, self.table, self.view = source, table, view

    def part(self, places: np.ndarray, *, training: bool) -> "MaskedPictures":
        """The pictures at some places `(n,)`, changed as these are or whole."""
        some, view = SomeMasked(self.masked, places), self.view if training else None
        return MaskedPictures(some, self.table, view, self.levels, self.max_corrupt)

    def picture(self, place: int) -> tuple[str, Path]:
        """What an error calls the picture at a place, and its file."""
        path = self.masked.picture(place)
        return str(path), path

    def sample(self, place: int) -> tuple[Tensor, Tensor]:
        """Picture and label map at a place.

        Raises:
            UserError: the picture or the mask cannot be read.
        """
        name, path = self.picture(place)
        image = v2.pil_to_tensor(decode(path, name, levels=self.levels))
        mask = torch.from_numpy(self.table.labels(self.masked.codes(place)))
        return _seen(image, mask, self.view)

    def unlabelled(self, source: Source) -> "Unmasked":
        """Pictures without masks, changed as these are."""
        assert self.view is not None
        return Unmasked(source, self.view, self.max_corrupt, levels=self.levels)


class Unmasked(Pictures):
    """Pictures without masks, seen as others with theirs: label maps of `UNLABELLED`, 255 for padding.

    `transform` changes a picture and its label map together.
    """

    def seen(self, item: Item) -> tuple[Tensor, Tensor]:
        """The sample of a picture; UserError where it cannot be read."""
        image = v2.pil_to_tensor(decode(item.picture, item.name, levels=self.levels))
        return _seen(image, torch.full(image.shape[-2:], UNLABELLED), self.transform)


def _seen(image: Tensor, mask: Tensor, view: Callable[[Any], Any] | None) -> tuple[Tensor, Tensor]:
    """Picture and mask, changed together."""
    sample = {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask)}
    if view is not None:
        sample = view(sample)
    return sample["image"].as_subclass(Tensor), sample["mask"].as_subclass(Tensor).long()


def stack_or_list(samples: list[tuple[Tensor, Tensor]]) -> Batch:
    """A Batch of samples: tensors where all have one size, else lists.

    >>> small, large = (torch.zeros(3, s, s) for s in (4, 6))
    >>> type(stack_or_list([(small, small[0]), (large, large[0])]).images).__name__
    'list'
    """
    images, masks = (list(part) for part in zip(*samples, strict=True))
    if len({image.shape for image in images}) > 1:
        return Batch(images, masks)
    return Batch(torch.stack(images), torch.stack(masks))


def masked_splits(
    train: Masked,
    test: Masked,
    options: JointOptions,
    *,
    names: Sequence[str] | None,
    codes: Mapping[int, int] | None = None,
    ignore: int | None = None,
) -> dict[str, Any]:
    """What a data set of pictures and masks is, by the fields of `diffkd.data.base.Data`.

    Every mask is read once: codes and sizes are checked, and the pixels of each class counted.

    Args:
        train: the pictures to train on and their masks.
        test: those to test on.
        options: how training pictures are changed.
        names: of the classes; None takes the masks' values.
        codes: what the masks' codes mean; None takes value i for class i.
        ignore: the value that is void where no class has it.

    Raises:
        UserError: a file is damaged, sizes differ, or a mask holds a code that means nothing.
    """
    counted = [count(source, strict=not options.max_corrupt) for source in (train, test)]
    places = [source.place(i) for source in (train, test) for i in range(len(source))]
    counts = [found.pixels for split in counted for found in split]
    table, notes = settle(names, codes, counts, places, ignore)
    sums = [_summed(split) for split in counted]
    _check_content(table, *sums)
    height, width = Counter(found.size for found in counted[0]).most_common(1)[0][0]
    size = min(height, _LARGEST_CROP), min(width, _LARGEST_CROP)
    if options.crop_size is not None:
        size = size_of(options.crop_size, "data.crop_size")
    notes = (*dict.fromkeys((*train.notes, *test.notes)), *notes, table.told(sums[0]), *_sparse(table, *sums))
    notes += (f"training views of {size[0]}x{size[1]} out of pictures of {height}x{width}, as most are",)
    looked = look_over(*(Placed(len(split), split.picture) for split in (train, test)))
    if not any(map(is_colour, table.codes)):
        notes += look_at_masks(
            len(train) + len(test), lambda i: train.file(i) if i < len(train) else test.file(i - len(train))
        )
    notes += looked.notes + shared_pictures((len(train), train.picture), (len(test), test.picture))
    return {
        "train": MaskedPictures(train, table, options.view(size), looked.levels, options.max_corrupt),
        "test": MaskedPictures(test, table, None, looked.levels, options.max_corrupt),
        "view": TestView("whole", levels=looked.levels),
        "num_classes": len(table.names),
        "image_shape": (3, *size),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "class_names": table.names,
        "collate": stack_or_list,
        "notes": notes,
    }


def _summed(counts: Sequence[Count]) -> Counts:
    """Pixels by code of all masks."""
    total: dict[int, int] = {}
    for found in counts:
        for code, pixels in found.pixels.items():
            total[code] = total.get(code, 0) + pixels
    return total


def _check_content(table: ClassTable, train: Counts, test: Counts) -> None:
    """Refuses masks that nothing can be learnt from, or measured on."""
    for what, found in (("training", train), ("test", test)):
        classes = {table.codes[code] for code, pixels in found.items() if pixels} - {VOID}
        if not classes:
            raise UserError(f"every pixel of the {what} masks is void: {table.told(found, what)}")
        if len(classes) == 1 and what == "training":
            raise UserError(
                f"the training masks show '{table.names[classes.pop()]}' alone: there is nothing to tell "
                f"apart; {table.told(found)}; data.classes says what values mean"
            )


def _sparse(table: ClassTable, train: Counts, test: Counts) -> list[str]:
    """What is to be said of classes that a split lacks."""
    there = [{table.codes[code] for code, pixels in found.items() if pixels} for found in (train, test)]
    kinds = {
        "only the test masks show": there[1] - there[0],
        "only the training masks show": there[0] - there[1],
        "no mask shows": set(range(len(table.names))) - there[0] - there[1],
    }
    return [
        f"{what} {quoted([table.names[i] for i in sorted(found) if i < len(table.names)], 8)}"
        for what, found in kinds.items()
        if any(i < len(table.names) for i in found)
    ]
