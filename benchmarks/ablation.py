"""Many short runs of small networks on pictures in memory: what each setting of a method is worth.

    python benchmarks/ablation.py digits-8x8 --epochs 20 --seeds 8 kd diffkd diffkd:preset=paper diffkd+kd
    python benchmarks/ablation.py digits --epochs 8 --seeds 8 kd diffkd diffkd:warmup=0.0
    python benchmarks/ablation.py fashion --root FASHION --epochs 8 kd diffkd diffkd:map.standardize=false

A variant is methods joined by +, each with its weight and options after colons; options that begin with
`map.` or `scores.` change DiffKD's preset itself, for maps or class scores. The student alone is always
run. One teacher a setting, its answers computed once for eight augmented views of each training picture, so
that a run costs little more than the student; one thread. Runs of one seed share the student's first weights,
the order of the pictures and their views: differences are paired, with 95 % intervals. Test pictures are
looked at once, at the end. Figures go to a file and are not computed again.
"""

import argparse
import json
import math
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from scipy.stats import t as student_t
from torch import Tensor, nn

from diffkd import Batch
from diffkd.data.base import builder
from diffkd.maths import presets
from diffkd.maths.randomness import seed_everything
from diffkd.methods.base import Feature, Pair, Setup
from diffkd.methods.choice import Chosen, chosen_methods
from diffkd.models.simple import SimpleCNN

VIEWS = 8


class Kind(NamedTuple):
    """Where a setting's pictures come from, widths of its networks, and how long its teacher is trained."""

    data: str
    options: dict[str, Any]
    teacher: int
    student: int
    teacher_epochs: int
    train: int | None = None  # the first so many pictures of training


SETTINGS = {
    "digits-8x8": Kind("digits", {}, 16, 3, 60),
    "digits": Kind("digit_scenes", {}, 16, 4, 10),
    "scenes-32": Kind("digit_scenes", {"size": 32, "train_scenes": 5000}, 32, 4, 12),
    "fashion": Kind("arrays", {}, 32, 4, 12, 6000),
}


class Setting:
    """Pictures in memory, and what the teacher answers for every view of them.

    Attributes:
        images: `(V, N, C, H, W)` of the training pictures; `features`, `scores`: the teacher's of these.
        labels: `(N,)`; `test`: pictures and labels.
    """

    def __init__(self, name: str, root: str | None) -> None:
        kind = SETTINGS[name]
        data = builder(kind.data)(root, **kind.options)
        self.width = kind.student
        self.classes = data.num_classes or 0
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
        places = torch.arange(kind.train or len(data.train))
        views = [data.train.batch(places, seed) for seed in range(VIEWS)]
        test = data.test.batch(torch.arange(len(data.test)), 0)
        self.images = torch.stack([(view.images / 255 - mean) / std for view in views])
        self.labels = views[0].targets
        self.test = (test.images / 255 - mean) / std, test.targets
        seed_everything(12345)
        teacher = self.network(kind.teacher)
        train(self, teacher, {}, kind.teacher_epochs, 12345)
        self.accuracy = accuracy(self, teacher)
        with torch.no_grad():
            answers = [answer(teacher, part) for part in self.images.flatten(0, 1).split(500)]
        count = self.images.shape[:2]
        self.features, self.scores = (torch.cat(x).unflatten(0, count) for x in zip(*answers, strict=True))

    def network(self, width: int) -> SimpleCNN:
        """A fresh network."""
        return SimpleCNN(width, self.images.shape[2], self.classes)

    def methods(self, chosen: dict[str, Chosen], student: SimpleCNN) -> dict[str, nn.Module]:
        """The methods, for the last map and the scores."""
        with torch.no_grad():
            ours, _ = answer(student, self.images[0, :2])
        scores = Feature("", (self.classes,))
        pairs = (
            Pair(
                "map", Feature("map", tuple(ours.shape[1:])), Feature("map", tuple(self.features.shape[2:]))
            ),
            Pair("output", scores, scores, is_logits=True),
        )
        found = {}
        of_scores = {name for name, choice in chosen.items() if choice.of_scores}
        for name, choice in chosen.items():
            wanted = pairs[1:] if choice.build.stages == "none" else pairs
            wanted, _ = choice.pairs(name, wanted, scores_taught=bool(of_scores - {name}))
            setup = Setup(wanted, student, student, self.classes, len(self.labels))
            found[name] = choice.build(setup)
        return found


def answer(model: SimpleCNN, images: Tensor) -> tuple[Tensor, Tensor]:
    """The last map and the class scores."""
    features = model.stage3(model.stage2(model.stage1(images)))
    return features, model.head(features.mean((2, 3)))


def train(
    setting: Setting, model: SimpleCNN, chosen: dict[str, Chosen], epochs: int, seed: int, size: int = 64
) -> None:
    """SGD with momentum on a cosine, by the labels and the methods."""
    methods = nn.ModuleDict(setting.methods(chosen, model) if chosen else {})
    generator, count = torch.Generator().manual_seed(seed), len(setting.labels)
    optimizer = torch.optim.SGD([*model.parameters(), *methods.parameters()], 0.1, 0.9, weight_decay=5e-4)
    steps = math.ceil(count / size) * epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for method in methods.values():
        method.expect(steps)
    model.train()
    for _ in range(epochs):
        for places in torch.randperm(count, generator=generator).split(size):
            view = torch.randint(VIEWS, (len(places),), generator=generator)
            features, scores = answer(model, setting.images[view, places])
            loss = F.cross_entropy(scores, setting.labels[places])
            if methods:
                ours = {"map": features, "output": scores}
                theirs = {"map": setting.features[view, places], "output": setting.scores[view, places]}
                batch = Batch(setting.images[view, places], setting.labels[places], places)
                for name, method in methods.items():
                    loss = loss + chosen[name].weight * sum(method(ours, theirs, batch).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(setting: Setting, model: SimpleCNN) -> float:
    """Per cent of the test pictures."""
    model.eval()
    images, labels = setting.test
    right = sum(
        int((answer(model, x)[1].argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return 100 * right / len(labels)


def parse(variant: str) -> dict[str, Chosen]:
    """`kd:weight=0.5+diffkd:preset=paper:num_steps=3` as methods."""
    words: dict[str, dict] = {}
    for part in variant.split("+"):
        name, *options = re.split(r":(?=[\w.]+=)", part)
        words[name] = {key: yaml.safe_load(value) for key, _, value in (o.partition("=") for o in options)}
    return {} if variant == "none" else chosen_methods(words)


@contextmanager
def changed(variant: str) -> Iterator[str]:
    """What is left of a variant when its options of the preset are in force."""
    usual = dict(presets.PRESETS["robust"])
    found = re.findall(r":(map|scores)\.(\w+)=([^:+]+)", variant)
    try:
        for which, key, value in found:
            distance = {"map": "mse", "scores": "kl"}[which]
            now = presets.PRESETS["robust"][distance]
            presets.PRESETS["robust"][distance] = replace(now, **{key: yaml.safe_load(value)})
        yield re.sub(r":(map|scores)\.\w+=[^:+]+", "", variant)
    finally:
        presets.PRESETS["robust"].update(usual)


def interval(ours: Tensor, theirs: Tensor) -> str:
    """Mean of the paired differences, and half the width of their 95 % interval."""
    gaps, count = ours - theirs, len(ours)
    half = student_t.ppf(0.975, count - 1) * gaps.std().item() / count**0.5 if count > 1 else math.nan
    return f"{gaps.mean():+.2f} +- {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--root")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/ablation.jsonl"))
    wanted = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    known = {}
    if wanted.output.is_file():
        lines = [json.loads(line) for line in wanted.output.read_text().splitlines()]
        known = {(e["setting"], e["epochs"], e["variant"], e["seed"]): e["top1"] for e in lines}
    wanted.output.parent.mkdir(parents=True, exist_ok=True)
    setting = Setting(wanted.setting, wanted.root)
    print(f"{wanted.setting}, {wanted.epochs} epochs, {wanted.seeds} seeds, {date.today()}, ", end="")
    print(f"torch {torch.__version__}, {platform.machine()} CPU; teacher {setting.accuracy:.2f} %")
    scores: dict[str, Tensor] = {}
    for variant in dict.fromkeys(["none", *wanted.variants]):
        started, values = time.perf_counter(), []
        for seed in range(wanted.seeds):
            key = (wanted.setting, wanted.epochs, variant, seed)
            if key not in known:
                seed_everything(seed)
                student = setting.network(setting.width)
                with changed(variant) as methods:
                    train(setting, student, parse(methods), wanted.epochs, seed)
                known[key] = accuracy(setting, student)
                names = ("setting", "epochs", "variant", "seed", "top1")
                with wanted.output.open("a") as file:
                    file.write(json.dumps(dict(zip(names, (*key, known[key]), strict=True))) + "\n")
            values.append(known[key])
        scores[variant] = torch.tensor(values)
        spread = scores[variant].std().item() if wanted.seeds > 1 else math.nan
        line = f"{variant:<40}{scores[variant].mean():6.2f} +- {spread:4.2f}"
        for other in ("none", "kd"):
            if other in scores and other != variant:
                line += f"   to {other} {interval(scores[variant], scores[other])}"
        print(f"{line}   {(time.perf_counter() - started) / wanted.seeds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
