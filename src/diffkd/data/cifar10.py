"""CIFAR-10 (Krizhevsky, 2009): 60,000 pictures of 32x32 pixels in 10 classes, kept whole in memory."""

from diffkd.data.base import Data
from diffkd.pictures.arrays import ArrayOptions, load_cifar
from diffkd.pictures.memory import ArraySplit
from diffkd.pictures.options import spread

_MEAN = (0.4914, 0.4822, 0.4465)
_STD = (0.2470, 0.2435, 0.2616)


@spread(ArrayOptions)
def build(root: str | None, *, download: bool = False, options: ArrayOptions) -> Data:
    """CIFAR-10 with its own test split, and the mean and standard deviation usual in the literature.

    Args:
        root: folder with `train.npz` and `test.npz` (`x` `(N, 32, 32, 3)` uint8, `y` `(N,)`), or with
            the official Python version.
        download: fetch the official version into `root` if it is not there.
        options: how training pictures are augmented.

    Raises:
        UserError: nothing of the kind is there, it is damaged, or the download fails.
    """
    train, test, class_names = load_cifar(root, "cifar10", download)
    return Data(
        train=options.split(train, _MEAN),
        test=ArraySplit(test.images, test.targets),
        num_classes=10,
        image_shape=(3, 32, 32),
        mean=_MEAN,
        std=_STD,
        class_names=class_names,
    )
