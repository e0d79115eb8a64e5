"""Step time and memory of DiffKD on a feature map and a logit map, against the picture's size.

    python benchmarks/dense.py [--stride 8] [--channels 256] [--classes 19] [--batch 2] [--device cuda]

Memory is what the forward pass keeps for the backward pass; both must grow linearly with positions.
"""

import argparse
import time

import torch

from diffkd.batch import Batch
from diffkd.methods.base import Feature, Pair, Setup
from diffkd.methods.diffkd import DiffKDMethod
from diffkd.models.measure import SavedBytes, machine

SIZES = [(180, 240), (256, 512), (360, 480), (512, 512), (512, 1024)]
KINDS = {
    "as it is": {},
    "pool=2": {"pool": 2},
    "recompute": {"recompute": True},
    "pool=2, recompute": {"pool": 2, "recompute": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, usual in (("stride", 8), ("channels", 256), ("classes", 19), ("batch", 2), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", default="robust")
    wanted = parser.parse_args()
    print(f"{machine(wanted.device)}; {vars(wanted)}")
    print(f"{'pictures':<12}{'':<20}{'positions':>10}{'ms/step':>10}{'MB kept':>10}{'bytes/position':>16}")
    for size in SIZES:
        for label, options in KINDS.items():
            milliseconds, kept = measure(size, wanted, options)
            positions = wanted.batch * (size[0] // wanted.stride) * (size[1] // wanted.stride)
            place = f"{size[0]}x{size[1]}"
            print(
                f"{place:<12}{label:<20}{positions:>10}{milliseconds:>10.1f}"
                f"{kept / 2**20:>10.1f}{kept / positions:>16.0f}"
            )


def measure(size: tuple[int, int], wanted: argparse.Namespace, options: dict) -> tuple[float, int]:
    """Milliseconds of a step, forward and backward, and the bytes that are kept in between."""
    torch.manual_seed(0)
    grid = size[0] // wanted.stride, size[1] // wanted.stride
    widths = {"decoder": (wanted.channels, wanted.channels), "output": (wanted.classes, wanted.classes)}
    pairs = tuple(
        Pair(name, Feature(name, (ours, *grid)), Feature(name, (theirs, *grid)), is_logits=name == "output")
        for name, (ours, theirs) in widths.items()
    )
    setup = Setup(pairs, torch.nn.Identity(), torch.nn.Identity(), wanted.classes, 1000)
    method = DiffKDMethod(setup, preset=wanted.preset, warmup=0.0, **options).to(wanted.device)
    student, teacher = (
        {p.name: torch.randn(wanted.batch, *p.student.shape, device=wanted.device) for p in pairs}
        for _ in range(2)
    )
    student = {name: feature.requires_grad_() for name, feature in student.items()}
    batch = Batch(torch.zeros(wanted.batch, 3, *size, device=wanted.device))
    times, saved = [], SavedBytes()
    for repeat in range(wanted.repeats + 1):
        started = time.perf_counter()
        if repeat == 0:
            with saved:
                losses = method(student, teacher, batch)
        else:
            losses = method(student, teacher, batch)
        sum(losses.values()).backward()
        if wanted.device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1000 * min(times[1:]), saved.total


if __name__ == "__main__":
    main()
