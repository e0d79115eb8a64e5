"""Pictures and labels in NumPy files: kept whole on the device, augmented there, no loader process."""

from typing import Literal

from diffkd.data.base import Data
from diffkd.pictures.arrays import ArrayOptions, load_arrays
from diffkd.pictures.memory import ArraySplit, channel_statistics
from diffkd.pictures.options import data_folder, spread


@spread(ArrayOptions)
def build(
    root: str | None,
    *,
    val_fraction: float = 0.1,
    labels: Literal["given", "none"] = "given",
    num_classes: int | None = None,
    first_label: int = 0,
    options: ArrayOptions,
) -> Data:
    """A folder with one of these pairs for each split.

    - `train.npz` and `test.npz`, each with `x` `(N, H, W, C)` or `(N, H, W)`, uint8 or float in
      0 to 1, and `y` `(N,)`, integers;
    - `x_train.npy` and `y_train.npy`, `x_test.npy` and `y_test.npy`, of the same content;
    - `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, and `t10k-...`, gzipped or not, as
      MNIST, Fashion-MNIST and their like come;
    - one `.npz` file with `x_train`, `y_train`, `x_test`, `y_test`.

    Other capitals are understood, so are `images` and `labels` for `x` and `y`, and `val` for `test`.

    Args:
        root: the folder.
        val_fraction: share of the training pictures to test on, where there is no test file.
        labels: "none" trains without labels; the test split keeps those that it has.
        num_classes: number of classes; the highest label plus one if not given.
        first_label: the number of the first class.
        options: how training pictures are augmented.

    Raises:
        UserError: a file is missing, damaged or holds the wrong thing; it is named.
    """
    folder = data_folder(root, "arrays")
    train, test, count, notes = load_arrays(
        folder,
        labels=labels,
        val_fraction=val_fraction,
        num_classes=num_classes,
        first_label=first_label,
    )
    mean, std = channel_statistics(train.images)
    channels, height, width = train.images.shape[1:]
    return Data(
        train=options.split(train, mean),
        test=ArraySplit(test.images, test.targets),
        num_classes=count,
        image_shape=(channels, height, width),
        mean=mean,
        std=std,
        notes=notes,
        test_held_out=test.source == train.source,
    )
