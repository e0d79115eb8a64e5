"""Step time and memory of DiffKD on P3 to P7: one module a level or one for all, with and without pooling.

    python benchmarks/detection_levels.py [--side 640] [--batch 8] [--channels 256] [--device cuda]

Features are random; a step is forward and backward of the method alone. Figures go to the terminal.
"""

import argparse
import platform
import time

import torch
from torch import nn

from diffkd.batch import Batch
from diffkd.methods.base import Feature, Pair, Setup
from diffkd.methods.diffkd import DiffKDMethod
from diffkd.models.measure import peak_memory, reset_peak_memory

_STRIDES = (8, 16, 32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=640)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", default="robust")
    args = parser.parse_args()
    print(
        f"{platform.machine()}, {args.device}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(f"{args.batch} pictures of {args.side}x{args.side}, {args.channels} channels, preset {args.preset}")
    for shared in (False, True):
        for pool in (1, 2, 4):
            seconds, memory, weights = measure(args, shared, pool)
            print(f"shared={shared!s:<5} pool={pool}: {seconds:.3f} s, {memory:,.0f} MB, {weights:,} weights")


def measure(args: argparse.Namespace, shared: bool, pool: int) -> tuple[float, float, int]:
    """Median seconds of a step, peak memory in MB, and weights."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    sides = {f"p{i}": -(-args.side // stride) for i, stride in enumerate(_STRIDES, 3)}
    shapes = {name: (args.channels, side, side) for name, side in sides.items()}
    pairs = tuple(Pair(name, Feature(name, s), Feature(name, s)) for name, s in shapes.items())
    setup = Setup(pairs, nn.Identity(), nn.Identity())
    method = DiffKDMethod(setup, preset=args.preset, shared=shared, pool=pool).to(device).train()
    student, teacher = (
        {name: torch.randn(args.batch, *s, device=device) for name, s in shapes.items()} for _ in range(2)
    )
    batch = Batch(torch.zeros(args.batch, 3, args.side, args.side, device=device))
    for feature in student.values():
        feature.requires_grad_()
    reset_peak_memory(device)
    seconds = []
    for _ in range(args.steps + 1):
        started = time.perf_counter()
        torch.stack(list(method(student, teacher, batch).values())).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    weights = sum(p.numel() for p in method.parameters())
    return sorted(seconds[1:])[args.steps // 2], peak_memory(device) / 2**20, weights


if __name__ == "__main__":
    main()
