"""What the loader costs at the size of ImageNet: scanning, epoch starts, seeding, memory; and its pictures.

    python benchmarks/loader.py [--rows 100000] [--samples 1281167] [--pictures 256]

All but the last table is of stand-ins: empty files, samples that are a number. The last one reads
JPEGs of 500x375 pixels, made here, beside torchvision's ImageFolder and timm's loader: batches of
64 uint8 pictures of 224x224 pixels by the same augmentation, in turn, in this process. Times are
of the processor, the best of several; ratios the median over the rounds. Figures go to the terminal.
"""

import argparse
import platform
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from diffkd.data.base import Loader, builder
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
    parser.add_argument("--pictures", type=int, default=256)
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
    with tempfile.TemporaryDirectory() as place:
        paint(Path(place), wanted.pictures)
        for split, loaders in (("train", training(place)), ("val", testing(place))):
            race(f"a {split} picture", loaders, wanted.pictures)


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


def paint(folder: Path, count: int) -> None:
    """JPEGs of 500x375 pixels, as large as photos: smooth colours and some noise."""
    random = np.random.default_rng(0)
    for i in range(count):
        smooth = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(smooth) + random.normal(0, 12, (375, 500, 1))
        content = BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=90)
        for split in ("train", "val"):
            place = folder / split / f"n{i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.JPEG").write_bytes(content.getvalue())


def training(root: str) -> dict[str, Callable[[], Any]]:
    """An epoch of training pictures: random resized crops, mirrored at random."""
    ours = Loader(builder("folder")(root).train, 64, shuffle=True)
    change = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    theirs = DataLoader(ImageFolder(f"{root}/train", transforms.Compose(change)), 64, shuffle=True)
    dataset = create_dataset("", root=f"{root}/train", is_training=True)
    options = {"is_training": True, "color_jitter": None, "interpolation": "bilinear"}
    return {"diffkd": ours.epoch, "torchvision": lambda: theirs, "timm": lambda: of_timm(dataset, options)}


def testing(root: str) -> dict[str, Callable[[], Any]]:
    """All test pictures: the centre, after the shorter side is brought to 256 pixels."""
    ours = Loader(builder("folder")(root).test, 64, shuffle=False)
    change = [transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()]
    theirs = DataLoader(ImageFolder(f"{root}/val", transforms.Compose(change)), 64)
    dataset = create_dataset("", root=f"{root}/val", is_training=False)
    options = {"is_training": False, "crop_pct": 0.875, "interpolation": "bilinear"}
    return {"diffkd": ours.epoch, "torchvision": lambda: theirs, "timm": lambda: of_timm(dataset, options)}


def of_timm(dataset: Any, options: dict[str, Any]) -> Any:
    """Its loader's batches before they are normalised."""
    size: dict[str, Any] = {"input_size": (3, 224, 224), "batch_size": 64, "num_workers": 0}
    found = create_loader(
        dataset, **size, **options, device=torch.device("cpu"), persistent_workers=False, pin_memory=False
    )
    return found.loader


def race(what: str, loaders: dict[str, Callable[[], Any]], count: int, rounds: int = 6) -> None:
    """Times of loaders in turn."""
    found = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, batches in loaders.items():
            started = time.process_time()
            for _batch in batches():
                pass
            found[name].append((time.process_time() - started) / count * 1e3)
    for name, times in found.items():
        ratio = np.median(np.divide(times, found["diffkd"]))
        print(f"{what}, {name}: {min(times):.2f} ms, {ratio:.2f} of diffkd's time")


def measure(what: str, work: Callable[[], Any]) -> None:
    seconds = best(work)
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{what}: {seconds:.3f} s, {peak / 1e6:.1f} MB at most")


def best(work: Callable[[], Any], times: int = 5) -> float:
    """The processor's seconds, of the quickest of several times."""
    seconds = []
    for _ in range(times):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return float(np.min(seconds))


if __name__ == "__main__":
    main()
