"""What the loader costs at the size of ImageNet: scanning, epoch starts, seeding, memory.

    python benchmarks/loader.py [--rows 100000] [--samples 1281167]

Everything is a stand-in: empty files, samples that are a number. Figures go to the terminal.
"""

import argparse
import platform
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from diffkd.data.base import Loader
from diffkd.data.folder import _folders, _labelled
from diffkd.pictures.listed import read_list
from diffkd.pictures.memory import ArraySplit
from diffkd.pictures.scan import Scan


class StandIn:
    """As many samples as wanted, each a number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(1, 1, 1), 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1_281_167)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}, one thread")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(folder, wanted.rows)
        measure(f"folder of {wanted.rows:,} files", lambda: scanned(folder / "train"))
        measure(f"list of {wanted.rows:,} rows", lambda: read_list(folder / "train.csv", None, None))
    split = StandIn(wanted.samples)
    measure(f"epoch start of {wanted.samples:,} samples", lambda: first(split))
    images = torch.zeros(wanted.samples, 1, 1, 1, dtype=torch.uint8)
    arrays = ArraySplit(images, torch.zeros(wanted.samples, dtype=torch.int64), crop_padding=1)
    measure("the same, in memory", lambda: first(arrays))
    seeded = Loader(StandIn(4096), 256, shuffle=True)
    plain = DataLoader(StandIn(4096), 256)
    ours, theirs = (best(work) / 4.096 for work in (lambda: list(seeded.epoch()), lambda: list(plain)))
    print(f"seeding a sample: {ours - theirs:.4f} ms, without: {theirs:.4f} ms")


def first(split: Any) -> Any:
    return next(Loader(split, 1, shuffle=True).epoch(1))


def write(folder: Path, count: int) -> None:
    names = [f"train/n{i % 1000:08}/n{i % 1000:08}_{i}.JPEG" for i in range(count)]
    for name in names[:1000]:
        (folder / name).parent.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    rows = (f"{name},{i % 1000}" for i, name in enumerate(names))
    (folder / "train.csv").write_text("\n".join(["path,label", *rows]))


def scanned(folder: Path) -> Any:
    scan = Scan(folder)
    folders = _folders(scan)
    return _labelled(scan, tuple(folders), folders)


def measure(what: str, work: Callable[[], Any]) -> None:
    seconds = best(work)
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{what}: {seconds:.3f} s, {peak / 1e6:.1f} MB at most")


def best(work: Callable[[], Any], times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return float(np.min(seconds))


if __name__ == "__main__":
    main()
