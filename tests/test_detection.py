"""Detection from data in each format to the student: figures, resumption, the roles of detectors."""

import base64
import json
import re
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import box_files
from diffkd.assembly import assemble
from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.maths.precision import BoxPrecision, coco_precision
from diffkd.models.base import build
from diffkd.recipe.schema import load
from diffkd.report.examples import example_sections
from diffkd.runs.folder import RunFolder
from diffkd.tasks.detection import Detection

WORDS = [
    "boxes",
    "teacher=torchvision/retinanet:timm/test_resnet",
    "student=torchvision/retinanet:timm/test_efficientnet",
    "teacher.options={channels: 32, levels: [3, 5]}",
    "student.options={channels: 32, levels: [3, 5]}",
    "teacher.train.epochs=1",
    "trainer.epochs=2",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "data.size=64",
    "data.max_size=96",
    "data.batch_size=4",
    "data.workers=0",
    "method=fitnet",
]
COUNTS = {"train": 8, "test": 4}


# --- from data to the student ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
def test_every_format_gives_the_same_boxes(kind, tmp_path):
    from diffkd.data.boxes import build as boxes

    data = boxes(str(getattr(box_files, kind)(tmp_path, COUNTS)), size=64, flip=False)
    assert (len(data.train), len(data.test)) == (8, 4)
    squares = box_files.picture(tmp_path / "again.png", 5000)
    image, target = data.train[0]
    order = {"dim": data.class_names.index("dim"), "bright": data.class_names.index("bright")}
    for (left, top, bright), box, label in zip(squares, target["boxes"], target["labels"], strict=True):
        assert box.tolist() == pytest.approx([left, top, left + 24, top + 24], abs=1e-4)
        assert label == order[box_files.CLASSES[bright]]
        assert image[:, top + 1, left + 1].tolist() == [120 + 120 * bright] * 3


FORMATS = {"coco": "COCO JSON", "voc": "VOC XML", "yolo": "YOLO"}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_student_is_distilled_evaluated_and_resumed_bit_by_bit(kind, diffkd, tmp_path):
    """From a path and two models; what is cut off goes on to the same weights."""
    root = f"data.root={getattr(box_files, kind)(tmp_path / 'cells', {'train': 4, 'test': 2})}"
    words = [*WORDS, root, "data.batch_size=2", "trainer.save_every=1", "trainer.keep=all", "output=run"]
    words += ["optimizer.lr=0.004", "optimizer.lr_batch=8"]
    status, _, said = diffkd("distill", *words)
    assert status == 0, said
    assert FORMATS[kind] in said
    assert "backbone[p3]" in said
    assert "learning rate 0.001 for 2 pictures a step (0.004 for 8)" in said
    # half-way up, half-way down
    assert [row["lr"] for row in RunFolder(tmp_path / "run").read_history()] == pytest.approx([0.0005] * 2)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert {"ap", "ap50", "ap75", "voc_ap50"} <= set(summary["last"])
    assert len(summary["arrays"]["ap_per_class"]) == 2
    status, out, said = diffkd("evaluate", "run")
    assert status == 0, said
    assert out.count("as recorded") == len(summary["last"])

    weights = tmp_path / "run/student/model.safetensors"
    whole = weights.read_bytes()
    for later in sorted((tmp_path / "run/checkpoints").iterdir())[1:]:
        later.unlink()
    for place in (tmp_path / "run/summary.json", weights):
        place.unlink()
    status, _, said = diffkd("distill", "run/recipe.yaml", "resume=true")
    assert status == 0, said
    assert "resumed at" in said
    assert weights.read_bytes() == whole
    _check_page(tmp_path, kind)


def _check_page(folder, kind):
    """The same pictures with the truth and each model's boxes, and figures by size."""
    run = RunFolder(folder / "run")
    taught = run.read_summary()["teacher"]
    page = example_sections([("none", run), ("<b>", run)], taught["weights"])
    assert re.findall(r"<figcaption[^>]*>([^<]*)<", page) == ["truth", "teacher", "none", "&lt;b&gt;"] * 2
    rows = re.findall(r"<tr><th>([^<]*)</th><td[^>]*>([\d.]+)</td>", page)
    assert rows[0] == ("all", f"{100 * taught['ap']:.1f}")
    assert rows[3][0].startswith("small")
    first = Image.open(BytesIO(base64.b64decode(re.findall(r"jpeg;base64,([^\"]*)", page)[0])))
    assert first.size == (240, 240)  # of 64 pixels a side: words can be read
    if kind == "coco":
        left, top, bright = box_files.picture(folder / "again.png", 4000)[0]
        red, green, blue = np.asarray(first)[int((top + 12) * 3.75), int(left * 3.75)].astype(int)
        # classes go by their ids, in which bright comes first: it is red, the other is blue
        assert (red if bright else blue) > 1.5 * max(green, blue if bright else red)


# --- the roles -------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    root = box_files.coco(tmp_path, COUNTS)
    return assemble(load(WORDS[0], [*WORDS[1:], f"data.root={root}"]))


def test_both_models_see_the_same_padded_picture(parts):
    images = [torch.randint(0, 255, size, dtype=torch.uint8) for size in ((3, 40, 64), (3, 64, 50))]
    framed = parts.task.frame(Batch(images, [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}] * 2))
    assert framed.images.shape == (2, 3, 64, 64)
    assert framed.valid[0, :40].all()
    assert not framed.valid[0, 40:].any()
    assert framed.valid[1].float().mean(0).tolist() == [1] * 50 + [0] * 14
    prepared = parts.task.prepare(framed, parts.student.prepare)
    assert not prepared.images[0, :, 40:].any()
    assert torch.equal(prepared.images[1, :, :, :50], parts.student.prepare(images[1]))
    assert parts.task.frame(framed) is framed


def test_the_teacher_stops_at_its_taps(parts, monkeypatch):
    distiller, _ = parts.distiller(parts.sample(2))
    batch = next(iter(parts.loader(parts.data.train, shuffle=True).epoch()))
    for part in (distiller.teacher.head, distiller.teacher.anchor_generator):
        part.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
    losses = distiller.train()(batch)
    assert set(losses.supervised) == {"classification", "bbox_regression"}
    assert [pair.name for pair in distiller.pairs] == ["backbone[p3]", "backbone[p4]", "backbone[p5]"]
    own = parts.student.model.transform
    assert type(own).__name__ == "GeneralizedRCNNTransform"  # what ships prepares pictures itself


def test_a_detector_gives_what_it_gives_alone():
    model = build(
        "torchvision/fcos:timm/test_resnet",
        num_classes=2,
        image_shape=(3, 64, 64),
        options={"channels": 32, "score_thresh": 0.0, "image_mean": [0.0] * 3, "image_std": [1.0] * 3},
    )
    model.eval()
    task = Detection(_data(2))
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    targets = [{"origin": (64, 64)}, {"origin": (128, 32)}]
    batch = task.prepare(task.frame(Batch(images, targets)), nn.Identity())
    with torch.no_grad():
        ours, alone = task.predict(model, batch), model(images)
    assert len(ours[0]["boxes"])
    for answer, plain, scale in zip(ours, alone, ([1, 1, 1, 1], [0.5, 2, 0.5, 2]), strict=True):
        keep = plain["labels"] > 0
        assert torch.allclose(answer["boxes"], plain["boxes"][keep] * torch.tensor(scale), atol=1e-4)
        assert torch.equal(answer["labels"] + 1, plain["labels"][keep])


def _data(classes):
    from diffkd import Data

    return Data([], [], classes, (3, 64, 64))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("retinanet:timm/test_convnext", {"channels": 32}),
        ("fasterrcnn:timm/test_efficientnet", {"channels": 32}),
        ("fcos:timm/test_vit", None),
    ],
)
def test_heads_on_backbones(name, options):
    if options is None:
        with pytest.raises(Exception, match="strides"):
            build(f"torchvision/{name}", num_classes=2, image_shape=(3, 64, 64))
        return
    model = build(f"torchvision/{name}", num_classes=2, image_shape=(3, 64, 64), options=options)
    task = Detection(_data(2))
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    batch = task.prepare(task.frame(Batch([torch.rand(3, 64, 64)] * 2, [target, nothing])), nn.Identity())
    _, losses = task.train(model.train(), batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert len(model.backbone(batch.images)) == 5


# --- the metric ------------------------------------------------------------------------------------


def _random_answers(seed=0, pictures=12, classes=3):
    random = np.random.default_rng(seed)
    truth, found = [], []
    for p in range(pictures):
        for _ in range(random.integers(0, 5)):
            low, side = random.uniform(0, 80, 2), random.uniform(4, 120, 2)
            kind, ignored = random.integers(classes), random.random() < 0.2
            truth.append([p, kind, *low, *(low + side), side.prod(), ignored])
            for _ in range(random.integers(0, 3)):
                shift = random.normal(0, 0.08, 4) * np.concatenate([side, side])
                label = kind if random.random() < 0.8 else random.integers(classes)
                found.append([p, label, *(np.concatenate([low, low + side]) + shift), random.random()])
    return np.arange(pictures), np.array(found), np.array(truth)


def test_figures_are_those_of_pycocotools():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    pictures, found, truth = _random_answers()
    ours = coco_precision(pictures, found, truth, 3)
    box = lambda row: [row[2], row[3], row[4] - row[2], row[5] - row[3]]  # noqa: E731
    true = COCO()
    true.dataset = {
        "images": [{"id": int(p)} for p in pictures],
        "categories": [{"id": k} for k in range(3)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": int(r[0]),
                "category_id": int(r[1]),
                "bbox": box(r),
                "area": r[6],
                "iscrowd": int(r[7]),
            }
            for i, r in enumerate(truth)
        ],
    }
    true.createIndex()
    answers = [
        {"image_id": int(r[0]), "category_id": int(r[1]), "bbox": box(r), "score": r[6]} for r in found
    ]
    run = COCOeval(true, true.loadRes(answers), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    assert [float(ours[n]) for n in names] == pytest.approx(run.stats[:6].tolist(), abs=1e-9)
    assert 0.1 < ours["ap"] < 0.9


def test_voc_precision_by_hand():
    metric = BoxPrecision(2)
    box = lambda *corners: torch.tensor([[float(c) for c in corners]])  # noqa: E731
    truth = {"boxes": torch.cat([box(0, 0, 10, 10), box(20, 20, 40, 40)]), "labels": torch.tensor([0, 0])}
    # right, a second time the same, difficult, wrong: precision 1, 1/2, -, 1/3 at recall 1/2
    answers = {
        "boxes": torch.cat([box(0, 0, 10, 10), box(0, 0, 10, 9), box(60, 60, 80, 80), box(90, 90, 95, 95)]),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]),
        "labels": torch.zeros(4, dtype=torch.int64),
    }
    hard = {
        "boxes": torch.cat([truth["boxes"], box(60, 60, 80, 80)]),
        "labels": torch.zeros(3, dtype=torch.int64),
        "ignore": torch.tensor([False, False, True]),
    }
    metric.update([answers], [hard], torch.tensor([5]))
    figures = metric.compute()
    assert figures["voc_ap50"].item() == pytest.approx(0.5)
    assert figures["ap_per_class"].isnan().tolist() == [False, True]
    assert "ap_large" not in figures


# --- weights and class scores ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["retinanet:timm/test_resnet", "fasterrcnn:timm/test_resnet"])
def test_weights_for_other_classes_leave_the_head_fresh(name):
    from diffkd.models.weights import load_state

    ours, theirs = (
        build(f"torchvision/{name}", num_classes=k, image_shape=(3, 64, 64), options={"channels": 32})
        for k in (2, 20)
    )
    loaded = load_state(ours, theirs.state_dict(), "theirs", name=name, num_classes=2)
    assert loaded.fresh_head
    assert "for 2 classes" in loaded.note
    assert torch.equal(ours.backbone.body.conv1[0].weight, theirs.backbone.body.conv1[0].weight)


def test_class_scores_of_the_heads_are_distilled(tmp_path):
    root = box_files.coco(tmp_path, COUNTS)
    words = [*WORDS[1:-1], "method=kd", f"data.root={root}", "task.scores=true"]
    parts = assemble(load(WORDS[0], words))
    distiller, _ = parts.distiller(parts.sample(2))
    [pair] = [pair for pair in distiller.pairs if pair.is_logits]
    assert pair.student.shape == pair.teacher.shape == (3, 9 * (64 + 16 + 4))
    losses = distiller.train()(next(iter(parts.loader(parts.data.train, shuffle=True).epoch())))
    [loss] = losses.values()
    assert loss.requires_grad
    one = assemble(load(WORDS[0], [*words, "student.options={channels: 32, levels: [3, 6]}"]))
    with pytest.raises(UserError, match="same head and levels"):
        one.distiller(one.sample(2))
