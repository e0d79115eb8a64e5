"""Every recipe that comes along is built and run for two steps on stand-in data."""

import numpy as np
import pytest
from PIL import Image

from diffkd.recipe.files import builtin
from diffkd.recipe.schema import load

RECIPES = [
    name for name in builtin() if not name.startswith("digit") and load(name).task.name == "classification"
]
# Large teachers see small pictures here, and one has fewer blocks of its widths.
SMALL = {
    "timm/swin_large_patch4_window7_224": ["teacher.size=64", "teacher.options={depths: [2, 2, 2, 2]}"],
    "timm/swin_tiny_patch4_window7_224": ["student.size=64"],
}
PAIRS = {
    ("resnet56", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"),
    ("wrn_40_2", "wrn_16_2"),
    ("wrn_40_2", "wrn_40_1"),
    ("vgg13", "vgg8"),
    ("resnet32x4", "shufflenetv1"),
    ("resnet32x4", "shufflenetv2"),
    ("wrn_40_2", "shufflenetv1"),
    ("vgg13", "mobilenetv2"),
    ("resnet50", "mobilenetv2"),
}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Random pictures, as arrays of 32x32 and as two folders of classes."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        x = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(root / f"{split}.npz", x=x, y=np.arange(count) % 10)
        for kind in ("cat", "dog"):
            folder = root / "pictures" / split / kind
            folder.mkdir(parents=True)
            for i in range(count // 2):
                noise = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{i}.png")
    return root


def overrides(name, root, tmp_path):
    recipe = load(name)
    arrays = recipe.data.name.startswith("cifar")
    words = [f"data.root={root if arrays else root / 'pictures'}", "data.batch_size=4", "data.workers=0"]
    words += [] if arrays else ["data.image_size=64"]
    for side in (recipe.teacher, recipe.student):
        words += SMALL.get(side.model, [])
    words += ["teacher.weights=null", "teacher.train=null", "student.weights=null"]
    return [*words, "trainer.max_steps=2", "trainer.accelerator=cpu", f"output={tmp_path / 'run'}"]


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps(name, stand_in, tmp_path, diffkd):
    status, out, err = diffkd("distill", name, *overrides(name, stand_in, tmp_path))
    assert status == 0, err
    assert "student" in out
    header = (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    assert ".kd," in header
    assert ".diffusion," in header


def test_the_eleven_pairs_and_the_seven_rows_are_there():
    pairs = {tuple(n.removeprefix("cifar100/").split("-")) for n in RECIPES if n.startswith("cifar100/")}
    assert pairs == PAIRS
    rows = [load(n) for n in RECIPES if n.startswith("imagenet/")]
    assert len(rows) == 7
    assert all(r.method["diffkd"].options == {"latent_channels": 1024, "preset": "paper"} for r in rows)


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("cifar100")])
def test_settings_of_the_literature(name):
    recipe = load(name)
    slow = recipe.student.model.startswith(("cifar/mobile", "cifar/shuffle"))
    teacher = recipe.teacher_recipe()
    assert (recipe.optimizer.lr, teacher.optimizer.lr) == (0.01 if slow else 0.05, 0.05)
    for one in (recipe, teacher):
        assert (one.trainer.epochs, one.data.batch_size, one.optimizer.momentum) == (240, 64, 0.9)
        assert one.optimizer.weight_decay == 5e-4
        assert (one.schedule.milestones, one.schedule.factor) == ([150, 180, 210], 0.1)


def test_strategies_of_imagenet():
    rows = {n.removeprefix("imagenet/"): load(n) for n in RECIPES if n.startswith("imagenet/")}
    first, second = rows["resnet34-resnet18"], rows["resnet50-efficientnet_b0"]
    third = rows["swin_large-swin_tiny"]
    assert (first.optimizer.nesterov, first.optimizer.weight_decay) == (True, 1e-4)
    assert (third.data.options["interpolation"], third.optimizer.lr * third.schedule.final_factor) == (
        "bicubic",
        5e-6,
    )
    assert all(row.optimizer.no_decay == "auto" for row in rows.values())
    assert second.taps == rows["resnet50-mobilenetv2"].taps == {"conv_head": "layer4", "": ""}
    assert (third.taps, rows["swin_large-resnet50"].taps) == (
        {"norm": "norm", "": ""},
        {"layer4": "norm", "": ""},
    )


# Of the paper's appendix: epochs, batch, optimizer, learning rate, decay, smoothing, erasing, EMA, clipping.
STRATEGIES = {
    "resnet34-resnet18": (100, 256, "sgd", 0.1, 1e-4, 0.0, None, None, None),
    "resnet50-mobilenetv1": (100, 256, "sgd", 0.1, 1e-4, 0.0, None, None, None),
    "resnet50-resnet34": (450, 768, "rmsproptf", 0.048, 1e-5, 0.1, 0.2, 0.9999, None),
    "resnet50-mobilenetv2": (450, 768, "rmsproptf", 0.048, 1e-5, 0.1, 0.2, 0.9999, None),
    "resnet50-efficientnet_b0": (450, 768, "rmsproptf", 0.048, 1e-5, 0.1, 0.2, 0.9999, None),
    "swin_large-resnet50": (300, 1024, "adamw", 1e-3, 0.04, 0.1, 0.25, None, 5.0),
    "swin_large-swin_tiny": (300, 1024, "adamw", 1e-3, 0.04, 0.1, 0.25, None, 5.0),
}
SCHEDULES = {  # name, epochs of warm-up, and the rest
    100: ("step", 0, {"every": 30, "factor": 0.1}),
    450: ("step", 3, {"every": 2.4, "factor": 0.97}),
    300: ("cosine", 20, {}),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_values_of_imagenet(name):
    recipe = load(f"imagenet/{name}")
    trainer, data, optimizer = recipe.trainer, recipe.data, recipe.optimizer
    smoothing = recipe.task.options.get("label_smoothing", 0.0)
    erasing = data.options.get("random_erasing")
    assert STRATEGIES[name] == (
        *(trainer.epochs, data.batch_size, optimizer.name, optimizer.lr, optimizer.weight_decay),
        *(smoothing, erasing, trainer.ema, trainer.clip_grad_norm),
    )
    kind, warmup, rest = SCHEDULES[trainer.epochs]
    assert (recipe.schedule.name, recipe.schedule.warmup_epochs or 0) == (kind, warmup)
    assert {key: getattr(recipe.schedule, key) for key in rest} == rest
    assert data.options.get("augment") == (None if trainer.epochs == 100 else "rand-m9-mstd0.5")
    assert (data.mixup, data.cutmix) == ((0.8, 1.0) if trainer.epochs == 300 else (0.0, 0.0))


def test_one_teacher_serves_all_its_students():
    from diffkd.runs.identity import identify, short_name

    teachers = [load(n).teacher_recipe() for n in RECIPES if n.startswith("cifar100/resnet32x4")]
    ours = {short_name(identify(teacher, {})) for teacher in teachers}
    assert len(ours) == 1
