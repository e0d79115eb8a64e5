"""What editors and type checkers know of the losses: read by mypy, run by nobody."""

from typing import assert_type

from torch import Tensor

from diffkd import DiffKD, Distiller
from diffkd.distiller import Losses


def known(distiller: Distiller, diffkd: DiffKD, images: Tensor) -> None:
    assert_type(distiller(images), Losses)
    assert_type(distiller(images).total, Tensor)
    assert_type(diffkd(images, images).loss, Tensor)
