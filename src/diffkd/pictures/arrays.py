"""Arrays of pictures and labels read from files, with every mistake in them named."""

import contextlib
import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffkd.errors import UserError, first_line
from diffkd.pictures.memory import ArraySplit, hold_out
from diffkd.pictures.options import class_count, class_notes, data_folder

CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}
Labels = Literal["needed", "if there", "ignored"]


class Arrays(NamedTuple):
    """One split.

    Attributes:
        images: `(N, C, H, W)`, uint8, or float32 in 0 to 1.
        targets: `(N,)` int64, or None.
        source: the file that the labels, or else the images, came from.
    """

    images: Tensor
    targets: Tensor | None
    source: str

    def part(self, places: np.ndarray) -> "Arrays":
        """The samples at `places` only."""
        chosen = torch.from_numpy(places)
        targets = None if self.targets is None else self.targets[chosen]
        return self._replace(images=self.images[chosen], targets=targets)


@dataclass(frozen=True)
class ArrayOptions:
    """How pictures in memory are augmented.

    Attributes:
        crop_padding: pixels of black added on every side before a random crop of the old size.
        flip: mirror left and right at random; turn it off where that changes the class.
        cutout: side in pixels of a square painted over with the mean colour (arXiv 1708.04552).

    Raises:
        UserError: a number is negative.
    """

    crop_padding: int = 4
    flip: bool = True
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name}={getattr(self, name)} is negative; give 0 or more pixels")

    def split(self, arrays: Arrays, mean: tuple[float, ...]) -> ArraySplit:
        """A training split augmented so; `mean` is the colour that squares are painted with.

        Raises:
            UserError: the padding is larger than the pictures.
        """
        check_padding("crop_padding", self.crop_padding, arrays.images.shape[-2:])
        return ArraySplit(
            arrays.images,
            arrays.targets,
            crop_padding=self.crop_padding,
            flip=self.flip,
            cutout=self.cutout,
            fill=mean,
        )


def load_arrays(
    folder: Path,
    *,
    labels: Literal["given", "none"],
    val_fraction: float,
    num_classes: int | None,
    first_label: int = 0,
) -> tuple[Arrays, Arrays, int, tuple[str, ...]]:
    """Both splits of a folder, the number of classes, and notes on what was decided.

    Args:
        folder: holds for each split what `read_split` reads; without a test split, a share of the
            training pictures is held out.
        labels: "none" leaves the training labels unread.
        val_fraction: the share held out.
        num_classes: None counts them from the labels.
        first_label: the number of the first class.

    Raises:
        UserError: a file is missing, damaged or holds the wrong thing; it is named.
    """
    unlabelled = labels == "none"
    train = read_split(folder, "train", "ignored" if unlabelled else "needed", first_label)
    if train is None:
        found = sorted(path.name for path in folder.iterdir())[:6]
        raise UserError(
            f"no train.npz, x_train.npy or train-images-idx3-ubyte in '{folder}'"
            f" (there: {', '.join(found) or 'nothing'})"
        )
    notes: tuple[str, ...] = ()
    test = read_split(folder, "test", "if there" if unlabelled else "needed", first_label)
    if test is None:
        classes = None if train.targets is None else train.targets.numpy()
        kept, held = hold_out(len(train.images), val_fraction, classes)
        notes = (f"no test file: {len(held)} of {len(train.images)} training pictures held out as test",)
        train, test = train.part(kept), train.part(held)
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = [tuple(arrays.images.shape[1:]) for arrays in (train, test)]
        raise UserError(f"training pictures are {shapes[0]} (C, H, W), test pictures {shapes[1]}")
    count = _count_classes(train, test, num_classes)
    known = [None if arrays.targets is None else arrays.targets.numpy() for arrays in (train, test)]
    return train, test, count, notes + class_notes(count, known[0], known[1]) + _shared(train, test)


def _shared(train: Arrays, test: Arrays) -> tuple[str, ...]:
    """A note where pictures to train on and to test on are the same."""
    if train.images.dtype != test.images.dtype:
        return ()
    known = {hash(picture.tobytes()) for picture in train.images.numpy()}
    count = sum(hash(picture.tobytes()) in known for picture in test.images.numpy())
    return (f"{count} of {len(test.images)} test pictures are training pictures too",) * bool(count)


def check_padding(option: str, padding: int, size: Sequence[int]) -> None:
    """Refuses to pad pictures by more than their smaller side.

    Raises:
        UserError: `option` asks for that.

    >>> check_padding("shift", 9, (8, 8))
    Traceback (most recent call last):
    diffkd.errors.UserError: data.shift=9 is more than the pictures' 8 pixels
    """
    if padding > min(size):
        raise UserError(f"data.{option}={padding} is more than the pictures' {min(size)} pixels")


def _count_classes(train: Arrays, test: Arrays, num_classes: int | None) -> int:
    return class_count(num_classes, labels={test.source: test.targets, train.source: train.targets})


def read_split(
    folder: Path, split: Literal["train", "test"], labels: Labels, first_label: int = 0
) -> Arrays | None:
    """One split of a folder; None where it has no file of it.

    Read are, in this order, `train.npz` with the arrays `x` and `y`; `x_train.npy` and
    `y_train.npy`; the files of MNIST, `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`
    (`t10k-...` for the test), gzipped or not; and the only `.npz` file with the arrays `x_train` and so on.
    Capitals, and usual names in the place of `x`, `y` and `test`, are understood.

    Raises:
        UserError: a file is damaged or holds the wrong thing; it is named.
    """
    there = {place.name.lower(): place for place in sorted(folder.iterdir(), reverse=True) if place.is_file()}
    for pictures, classes, keys in _file_names(split, list(there)):
        source = there.get(pictures, folder / pictures)
        found = _read(source, keys[0])
        if found is not None:
            images = _checked_images(found, source)
            if labels == "ignored":
                return Arrays(images, None, f"'{source}'")
            source = there.get(classes, folder / classes)
            values = _read(source, keys[1])
            if values is None and labels == "needed":
                what = (
                    f"no y in '{source}'{_keys_of(source)}"
                    if source.is_file()
                    else f"no labels: there is no '{source}'"
                )
                raise UserError(f"{what}; add them, or set data.labels=none")
            targets = None if values is None else _checked_labels(values, len(images), source, first_label)
            return Arrays(images, targets, f"'{source}'")
        if source.suffix == ".npz" and source.is_file() and split in pictures:
            raise UserError(f"no x in '{source}'{_keys_of(source)}")
    return None


_Keys = tuple[tuple[str, ...], tuple[str, ...]]
_X, _Y = ("x", "images", "data", "image"), ("y", "labels", "targets", "label")


def _file_names(split: str, there: Sequence[str]) -> Iterator[tuple[str, str, _Keys]]:
    """Where the pictures of a split may be, in lower case, and its labels; and what the arrays are called."""
    names = (split,) if split == "train" else ("test", "val", "valid", "validation")
    for name in names:
        yield f"{name}.npz", f"{name}.npz", (_X, _Y)
    for name in names:
        yield f"x_{name}.npy", f"y_{name}.npy", ((), ())
    idx = "train" if split == "train" else "t10k"
    for ending in ("", ".gz"):
        yield f"{idx}-images-idx3-ubyte{ending}", f"{idx}-labels-idx1-ubyte{ending}", ((), ())
    archives = [name for name in there if name.endswith(".npz")]
    for name in names if len(archives) == 1 else ():
        x, y = (tuple(f"{a}_{b}" for key in kind for a, b in ((key, name), (name, key))) for kind in (_X, _Y))
        yield archives[0], archives[0], (x, y)


def _read(path: Path, keys: Sequence[str]) -> np.ndarray | None:
    """The array of a file, of an archive that of the first key that it has; None where there is none."""
    if not path.is_file():
        return None
    with _naming(path):
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                known = {key.lower(): key for key in archive.files}
                found = next((known[key] for key in keys if key in known), None)
                return None if found is None else np.asarray(archive[found])
        if path.suffix.lower() == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        return _parse_idx(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())


def _keys_of(path: Path) -> str:
    """What is in an archive, in words."""
    if path.suffix.lower() != ".npz":
        return ""
    with _naming(path), np.load(path, allow_pickle=False) as archive:
        return f" (there: {', '.join(archive.files) or 'nothing'})"


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong with a damaged file into one line that names it."""
    try:
        yield
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"cannot read '{path}': {reason}") from error


def _parse_idx(content: bytes) -> np.ndarray:
    """The array of bytes in MNIST's format: two zeros, the type 8, the rank, each length, the data."""
    if content[:3] != b"\0\0\x08":
        raise ValueError("not an idx file of unsigned bytes")
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()


def _checked_images(images: np.ndarray | None, source: Path) -> Tensor:
    """Pictures `(N, C, H, W)`, uint8 or float32."""
    if images is None:
        raise UserError(f"no x in '{source}'")
    shape, wanted = images.shape, "(N, H, W, C) or (N, H, W)"
    if images.ndim not in (3, 4) or 0 in shape:
        raise UserError(f"pictures in '{source}' have the shape {shape}, must be {wanted}")
    if images.ndim == 4 and shape[1] <= 4 < shape[3]:
        raise UserError(
            f"pictures in '{source}' have the shape {shape}, which looks like (N, C, H, W), not {wanted}"
        )
    if images.dtype != np.uint8:
        if not np.issubdtype(images.dtype, np.floating):
            raise UserError(f"pictures in '{source}' are {images.dtype}, must be uint8 (or float in 0 to 1)")
        if not np.isfinite(images).all():
            raise UserError(f"pictures in '{source}' hold NaN or infinite values")
        low, high = float(images.min()), float(images.max())
        if low < 0 or high > 1:
            raise UserError(
                f"floating-point pictures in '{source}' go from {low:g} to {high:g}, must lie in 0 to 1"
            )
        images = images.astype(np.float32)
    pictures = torch.from_numpy(images)
    return pictures[:, None] if images.ndim == 3 else pictures.permute(0, 3, 1, 2).contiguous()


def _checked_labels(labels: np.ndarray, count: int, source: Path, first: int) -> Tensor:
    """Class indices `(N,)`, int64, of labels that begin at `first`."""
    if labels.shape == (count, *labels.shape[1:]) and labels.ndim == 2 and labels.shape[1] > 1:
        raise UserError(
            f"labels in '{source}' have the shape {labels.shape}, which looks one-hot; store class indices "
            f"({count},): y.argmax(1)"
        )
    if labels.shape == (count, 1):
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise UserError(
            f"labels in '{source}' have the shape {labels.shape}, must be ({count},), one a picture"
        )
    if labels.dtype == np.bool_ or (labels.dtype.kind == "f" and _are_whole(labels)):
        labels = labels.astype(np.int64)
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"labels in '{source}' are {labels.dtype}, must be integers: "
            "np.unique(y, return_inverse=True)[1] numbers them"
        )
    for place in (int(np.argmin(labels)), int(np.argmax(labels))):
        if not first <= (label := int(labels[place])) < 2**62:
            raise UserError(f"'{source}' holds the label {label} (at {place}), must be {first} or more")
    return torch.from_numpy(labels.astype(np.int64) - first)


def _are_whole(values: np.ndarray) -> bool:
    """Whether floating-point numbers are whole ones, none too large to be exact."""
    return bool((np.isfinite(values) & (np.abs(values) < 2**24) & (values == np.round(values))).all())


def load_cifar(root: str | None, name: str, download: bool) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Both splits of CIFAR-10 or CIFAR-100 and the names of the classes, empty where not told.

    Args:
        root: folder with `train.npz` and `test.npz`, or with the official Python version, which
            torchvision reads once its checksums are right.
        name: one of `CIFAR_CLASSES`.
        download: fetch the official version if it is not there.

    Raises:
        UserError: nothing of the kind is there, it is damaged, or the download fails.
    """
    folder = Path(root).expanduser() if download and root is not None else data_folder(root, name)
    train, test = read_split(folder, "train", "needed"), read_split(folder, "test", "needed")
    if train is None or test is None:
        return _official_cifar(folder, name, download)
    for arrays in (train, test):
        if arrays.images.shape[1:] != (3, 32, 32):
            raise UserError(
                f"pictures in {arrays.source} are {tuple(arrays.images.shape[1:])}, not (3, 32, 32)"
            )
    _count_classes(train, test, CIFAR_CLASSES[name])
    return train, test, ()


def _official_cifar(folder: Path, name: str, download: bool) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    from torchvision import datasets

    kind = getattr(datasets, name.upper())
    try:
        train, test = (kind(str(folder), train=train, download=download) for train in (True, False))
    except (OSError, RuntimeError) as error:
        if download:
            raise UserError(f"'{name}' cannot be downloaded to '{folder}': {error}") from error
        raise UserError(
            f"no intact {kind.base_folder} in '{folder}', nor train.npz and test.npz; "
            "data.download=true fetches it; data=folder reads pictures in class folders, data=huggingface "
            "those in parquet"
        ) from error
    splits = [
        Arrays(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets),
            f"'{folder / kind.base_folder}'",
        )
        for part in (train, test)
    ]
    return splits[0], splits[1], tuple(train.classes)
