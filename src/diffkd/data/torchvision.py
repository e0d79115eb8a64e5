"""torchvision's classification data sets by name: Food101, OxfordIIITPet, ImageNet and others."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from diffkd.data.base import Data, of_pictures
from diffkd.errors import UserError, first_line, nearest
from diffkd.pictures.augment import PictureOptions
from diffkd.pictures.files import Item, Source, held_out
from diffkd.pictures.options import class_count, data_folder, spread

# what each data set calls the split to train on and the one to test on; None where it has no splits
_SPLITS: dict[str, tuple[Any, Any] | None] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "USPS"), (True, False)),
    **dict.fromkeys(("Country211", "DTD", "Flowers102", "Food101", "GTSRB"), ("train", "test")),
    **dict.fromkeys(("PCAM", "RenderedSST2", "STL10", "StanfordCars", "SVHN"), ("train", "test")),
    **dict.fromkeys(("FGVCAircraft", "OxfordIIITPet"), ("trainval", "test")),
    **dict.fromkeys(("ImageNet", "Imagenette"), ("train", "val")),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SUN397"), None),
}


@spread(PictureOptions)
def build(
    root: str | None,
    *,
    dataset: str = "",
    train_split: str | None = None,
    test_split: str | None = None,
    val_fraction: float = 0.1,
    download: bool = False,
    num_classes: int | None = None,
    options: PictureOptions,
) -> Data:
    """A data set of torchvision, read picture by picture; grey ones become RGB.

    Those of small pictures are faster as arrays (`cifar10`, `cifar100`, `arrays`, which reads MNIST's
    files too). ImageNet in plain class folders is for `folder`.

    Args:
        root: torchvision's `root`.
        dataset: its class name, such as "Food101" or "Flowers102".
        train_split: name of the split to train on, where it is not the usual one.
        test_split: name of the split to test on, likewise.
        val_fraction: share to test on of a data set without splits.
        download: fetch it into `root` if it is not there.
        num_classes: needed only where torchvision does not tell.
        options: how pictures are augmented.

    Raises:
        UserError: there is no such data set, or it is not in `root`.
    """
    if dataset not in _SPLITS:
        raise UserError(f"unknown data.dataset '{dataset}'{nearest(dataset, _SPLITS)}")
    folder = Path(root).expanduser() if download and root is not None else data_folder(root, "torchvision")
    usual = _SPLITS[dataset]
    notes: tuple[str, ...] = ()
    train: Source
    test: Source
    if usual is None:
        whole = _Pictures(dataset, folder, None, download)
        train, test, notes = held_out(whole, whole.targets(), val_fraction, dataset)
    else:
        whole = train = _Pictures(dataset, folder, train_split or usual[0], download)
        test = _Pictures(dataset, folder, test_split or usual[1], download)
    classes = whole.classes()
    return of_pictures(
        options,
        train,
        test,
        num_classes=class_count(num_classes, classes, {dataset: whole.targets()}),
        class_names=classes,
        notes=notes,
    )


class _Pictures:
    """One split of a data set of torchvision."""

    def __init__(self, name: str, folder: Path, split: Any, download: bool) -> None:
        kind = getattr(datasets, name)
        takes = inspect.signature(kind).parameters
        chosen: dict[str, Any] = {"download": True} if download and "download" in takes else {}
        if split is not None:
            chosen["train" if "train" in takes else "split"] = split
        self.name = name if split is None or isinstance(split, bool) else f"{name} {split}"
        try:
            self.dataset = kind(str(folder), **chosen)
        except Exception as error:
            reason = first_line(error)
            raise UserError(f"data set '{self.name}' cannot be read from '{folder}': {reason}") from error

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        try:
            picture, target = self.dataset[index]
        except Exception as error:
            raise UserError(f"cannot read picture {index} of {self.name}: {error}") from error
        return Item(f"{self.name} {index}", picture, int(target))

    def classes(self) -> tuple[str, ...]:
        """Names in the order of the indices; of several names of a class the first."""
        known = getattr(self.dataset, "classes", None) or getattr(self.dataset, "categories", [])
        return tuple(name if isinstance(name, str) else str(name[0]) for name in known)

    def targets(self) -> np.ndarray | None:
        """Class index of each picture, where it is known without reading them."""
        for name in ("targets", "labels", "_labels", "y"):
            if hasattr(self.dataset, name):
                return np.asarray(getattr(self.dataset, name))
        samples = getattr(self.dataset, "_samples", None)
        return None if samples is None else np.array([target for _, target in samples])
