"""Top-1 of the digits student alone and with DiffKD, over seeds, all trained alike.

    python benchmarks/digits.py [--seeds 5] [--output runs/benchmarks/digits] [key=value ...]

Finished runs are kept and not run again. Prints mean and standard deviation over the seeds, of the
last epoch and of the best epoch (the best on the test data: an optimistic figure).
"""

import argparse
import platform
from datetime import date
from pathlib import Path
from statistics import mean, stdev

import torch

from diffkd.recipe.schema import load
from diffkd.runs.console import Reporter
from diffkd.runs.folder import RunFolder
from diffkd.training.fit import fit

METHODS = {"none": "student alone", "diffkd": "with DiffKD"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/digits-8x8"))
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    wanted = parser.parse_intermixed_args()
    print(
        f"digits, {wanted.seeds} seeds, {date.today()}, torch {torch.__version__}, {platform.machine()} CPU"
    )
    print(f"{'':<16}{'top-1 last epoch, %':>24}{'top-1 best epoch, %':>24}")
    for method, label in METHODS.items():
        runs = [
            run(wanted.output / f"{method}-seed{seed}", method, seed, wanted.overrides)
            for seed in range(wanted.seeds)
        ]
        figures = [[100 * r[which]["top1"] for r in runs] for which in ("last", "best")]
        print(f"{label:<16}" + "".join(f"{spread(values):>24}" for values in figures))
    teacher = runs[0]["teacher"]
    print(f"teacher {teacher['model']}: {100 * teacher['top1']:.2f} %")


def run(folder: Path, method: str, seed: int, overrides: list[str]) -> dict:
    words = [f"method={method}", f"seed={seed}", f"output={folder}", "resume=true", *overrides]
    if not RunFolder(folder).finished:
        fit(load("digits-8x8", words), Reporter())
    return RunFolder(folder).read_summary()


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f} +- {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


if __name__ == "__main__":
    main()
