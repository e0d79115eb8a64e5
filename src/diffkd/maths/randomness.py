"""One seed for everything, random numbers of single samples, and the generators' states as plain values."""

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


class Draws:
    """Random numbers for a batch of samples at once, on their device, nothing waiting for it.

    Each sample's numbers depend on `(seed, index)` and on how many were drawn before, so that they are
    the same in whatever batch the sample comes. They are splitmix64's outputs (Steele et al., 2014).

    Args:
        seed: of this view of the samples.
        indices: `(B,)` int64 positions of the samples in their data set.

    >>> alone, among = Draws(0, torch.tensor([7])), Draws(0, torch.tensor([3, 7]))
    >>> (alone.integers(100) == among.integers(100)[1:]).all().item()
    True
    """

    def __init__(self, seed: int, indices: Tensor) -> None:
        self._state = _scramble(indices * _GOLDEN + _signed(seed))

    def integers(self, high: int) -> Tensor:
        """`(B,)` int64, uniform in 0 to `high - 1`, for a `high` of at most 2**31."""
        return _shift(self._next(), 32) * high >> 32

    def uniform(self) -> Tensor:
        """`(B,)` float32, uniform in 0 to 1, without 1."""
        return _shift(self._next(), 40).float() * 2.0**-24

    def _next(self) -> Tensor:
        self._state = self._state + _GOLDEN
        return _scramble(self._state)


def _signed(number: int) -> int:
    """The 64-bit integer with the same bits."""
    return (number + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _shift(bits: Tensor, places: int) -> Tensor:
    """Shifted right, zeros coming in: int64 would bring in its sign."""
    return bits >> places & (1 << 64 - places) - 1


def _scramble(bits: Tensor) -> Tensor:
    """splitmix64's finalizer; products wrap around."""
    bits = (bits ^ _shift(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shift(bits, 31)


def seed_sample(seed: int) -> None:
    """Seeds the CPU's generators of PyTorch, Python and NumPy: what a transform of one sample draws from.

    Unlike `torch.manual_seed`, no other device's generator is touched.
    """
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leaves the CPU's generators of PyTorch, Python and NumPy as they were.

    >>> before = torch.get_rng_state()
    >>> with generators_kept():
    ...     seed_sample(1)
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


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
