"""scikit-learn's digits, without the second that scikit-learn takes to be imported."""

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import numpy as np

from diffkd.pictures.kept import Kept


class Digits(NamedTuple):
    """1,797 digits that people wrote.

    Attributes:
        images: `(1797, 8, 8)` float64, 0 to 16.
        labels: `(1797,)` int64, which digits they are.
        train, test: places of those to train on and to test on, int64.
    """

    images: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray


def read_digits(test_size: int) -> Digits:
    """The digits, and always the same split of them, with the same share of every digit on both sides.

    What scikit-learn once gave is kept in the cache folder.

    Args:
        test_size: how many to test on.

    >>> digits = read_digits(360)
    >>> digits.images.shape, len(digits.train), len(digits.test)
    ((1797, 8, 8), 1437, 360)
    """
    try:
        kept = Kept("digits", ["scikit-learn", version("scikit-learn"), str(test_size)])
    except PackageNotFoundError:  # installed in a way of its own
        return _made(test_size)
    found = kept.load()
    if found.keys() == set(Digits._fields) and len(found["test"]) == test_size:
        return Digits(**found)
    made = _made(test_size)
    kept.save(made._asdict())
    return made


def _made(test_size: int) -> Digits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    labels = found.target.astype(np.int64)
    places = np.arange(len(labels))
    return Digits(
        found.images,
        labels,
        *train_test_split(places, test_size=test_size, stratify=labels, random_state=0),
    )
