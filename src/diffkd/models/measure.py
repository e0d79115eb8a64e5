"""What a model costs: parameters, multiply-adds, time per image, bytes."""

import contextlib
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from diffkd.maths.randomness import cpu_threads


@dataclass(frozen=True)
class Cost:
    """What one model costs to run.

    Attributes:
        parameters: number of weights.
        macs: multiply-adds of one image.
        milliseconds: median time of one image alone, on the device and in the precision of its weights; on
            a CPU on one thread.
        bytes: size of its weights and buffers on disk.
    """

    parameters: int
    macs: int
    milliseconds: float
    bytes: int

    def as_dict(self) -> dict[str, float]:
        """As plain values."""
        return asdict(self)


def cost(model: nn.Module, forward: Callable[[], object]) -> Cost:
    """The cost of a model whose `forward` runs one image through it.

    >>> layer = nn.Linear(10, 5)
    >>> found = cost(layer, lambda: layer(torch.zeros(1, 10)))
    >>> found.parameters, found.macs, found.bytes
    (55, 50, 220)
    """
    training = model.training
    model.eval()
    with torch.no_grad():
        found = Cost(parameters(model), macs(forward), milliseconds(forward, device_of(model)), size(model))
    model.train(training)
    return found


def parameters(model: nn.Module) -> int:
    """Number of weights, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


def size(model: nn.Module) -> int:
    """Bytes of the state that is saved."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, Tensor))


def macs(forward: Callable[[], object]) -> int:
    """Multiply-adds of the matrix products, convolutions and attentions that `forward` runs.

    >>> macs(lambda: torch.zeros(2, 3) @ torch.zeros(3, 4))
    24
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a layer of a transformer in one operation hides its own
    try:
        with (counter := _Macs()), torch.no_grad():  # type: ignore[no-untyped-call]
            forward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.total


class _Counting:
    """Adds up the multiply-adds of the operations that come by.

    It is no mode itself: what a mode defines PyTorch wraps so that the first call imports its compiler,
    which takes as long as PyTorch itself. The same goes for PyTorch's own counter.
    """

    supports_higher_order_operators = True
    total = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(func, torch._ops.OpOverload):
            name = func.overloadpacket.__name__
            if name not in _FORMULAS:  # whole under inference mode: seen by its parts
                with self:  # type: ignore[attr-defined]
                    parts = func.decompose(*args, **kwargs or {})
                if parts is not NotImplemented:
                    return parts
            out = func(*args, **kwargs or {})
            self.total += _FORMULAS[name](args, out) if name in _FORMULAS else 0
            return out
        return func(*args, **kwargs or {})


class _Macs(_Counting, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode: operations inside `with` come by."""


def _product(left: int) -> Callable[[Any, Any], int]:
    """Of a product of matrices whose left one is that argument."""
    return lambda args, out: out.numel() * args[left].shape[-1]


def _convolution(args: Any, out: Any) -> int:
    images, weight, transposed = args[0], args[1], args[6]
    return int((images if transposed else out).numel() * weight[0].numel())


def _attention(args: Any, out: object) -> int:
    query, key, value = args[:3]
    return int(query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


_FORMULAS: dict[str, Callable[[Any, Any], int]] = {
    **dict.fromkeys(("mm", "bmm", "_scaled_mm"), _product(0)),
    **dict.fromkeys(("addmm", "baddbmm"), _product(1)),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    **{
        f"_scaled_dot_product_{way}_attention{rest}": _attention
        for way, rest in (("flash", ""), ("flash", "_for_cpu"), ("efficient", ""), ("cudnn", ""))
    },
}


def milliseconds(forward: Callable[[], object], device: torch.device, budget: float = 0.5) -> float:
    """Median time of a call, over at least 5 calls and about `budget` seconds, after warming up.

    On a CPU it runs on one thread: what else runs there then counts least.
    """
    times: list[float] = []
    with cpu_threads(1 if device.type == "cpu" else None):
        started = time.perf_counter()
        for call in range(20):
            forward()
            if call >= 2 and time.perf_counter() - started > budget / 2:
                break
        started = time.perf_counter()
        while len(times) < 5 or (time.perf_counter() - started < budget and len(times) < 200):
            synchronize(device)
            before = time.perf_counter()
            forward()
            synchronize(device)
            times.append(1000 * (time.perf_counter() - before))
    return median(times)


def synchronize(device: torch.device) -> None:
    """Waits for the work under way on an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Starts counting anew for `peak_memory`, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on the accelerator, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found is not None:
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine(device: str) -> str:
    """What a run was measured on, in words."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    found = None
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = found[1] if found else f"{platform.machine()} CPU"
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


class SavedBytes(saved_tensors_hooks):
    """Counts the bytes of the activations that a forward pass keeps for the backward pass."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: set[int] = set()
        super().__init__(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are; the CPU for one that has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
