"""One seed for everything, and the random generators' states as plain values."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers (splitmix64's finalizer), so that no two uses coincide.

    >>> mix(0, 1) != mix(1, 0)
    True
    """
    state = 0
    for number in numbers:
        state = (state ^ (number + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def seed_everything(*numbers: int) -> None:
    """Seeds PyTorch (all devices), Python and NumPy from one or several numbers."""
    seed = mix(*numbers)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of all generators, as values that a checkpoint may hold."""
    numpy: Any = np.random.get_state(legacy=True)
    return {
        "torch": _bytes(torch.get_rng_state()),
        "device": _bytes(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [str(numpy[0]), numpy[1].tobytes(), *map(float, numpy[2:])],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts all generators back to where `random_state` found them."""
    torch.set_rng_state(_tensor(state["torch"]))
    if state["device"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(_tensor(state["device"]), device)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    words = np.frombuffer(keys, dtype=np.uint32)
    np.random.set_state((kind, words, int(position), int(has_gauss), cached))


def _bytes(state: Tensor) -> bytes:
    return state.numpy().tobytes()


def _tensor(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Runs with that many CPU threads; None leaves it to PyTorch.

    >>> with cpu_threads(1):
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
