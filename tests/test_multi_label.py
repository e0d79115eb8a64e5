"""Several classes for a picture: binary cross-entropy, mean average precision, binary distillation."""

import json

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from diffkd import Batch, Distiller
from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.maths.losses import binary_divergence
from diffkd.models.base import build
from diffkd.pictures.memory import ArraySplit, mix_batch, some
from diffkd.report.evaluation import account_of
from diffkd.tasks.classification import Classification

DATA = """
import torch
from diffkd import Data

class Colours(torch.utils.data.Dataset):
    def __init__(self, seed, bad=False):
        draw = torch.Generator().manual_seed(seed)
        self.rows = (torch.rand(48, 4, generator=draw) < 0.4).to(torch.uint8)
        self.rows[:, 3] = 0
        noise = torch.randint(0, 50, (48, 3, 8, 8), generator=draw)
        self.images = (self.rows[:, :3, None, None] * 200 + noise).to(torch.uint8)
        if bad:
            self.rows[40, 1] = 3
    def __len__(self): return 48
    def __getitem__(self, i): return self.images[i], self.rows[i]

def build(*, bad: bool = False):
    return Data(Colours(0, bad), Colours(1), 4, (3, 8, 8), class_names=("red", "green", "blue", "none"))
"""


def task(**options):
    split = ArraySplit(torch.zeros(4, 3, 8, 8), torch.arange(4))
    return Classification(Data(split, split, 4, (3, 8, 8)), multi_label=True, **options)


def test_no_confusion_is_counted_where_a_picture_shows_several_classes():
    assert account_of(task(), "abcd") is None


def batch(targets, images=None):
    return Batch(torch.zeros(len(targets), 3, 8, 8) if images is None else images, targets)


def test_a_run_learns_several_colours_and_its_student_says_which(tmp_path, tiny, diffkd):
    (tmp_path / "colours.py").write_text(DATA)
    words = ["tiny.yaml", "data=colours.py:build", "task.multi_label=true", "data.batch_size=8"]
    words += ["data.workers=0", "method=kd,diffkd", "trainer.steps=18", "optimizer.lr=0.1", "output=run"]
    status, out, err = diffkd("distill", *words)
    assert status == 0, err
    assert "mAP" in out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["metric"] == "map"
    assert summary["last"]["map"] > 0.45
    precisions = summary["arrays"]["ap"]
    assert precisions[3] is None  # no picture shows it
    assert sum(precisions[:3]) / 3 == pytest.approx(summary["last"]["map"], abs=1e-6)
    status, out, _ = diffkd("evaluate", "run", "trust=true")
    assert out.count("as recorded") == 2
    from PIL import Image

    Image.new("RGB", (8, 8), (220, 220, 20)).save(tmp_path / "yellow.png")
    status, _, err = diffkd("predict", "run", "yellow.png", "trust=true", "output=seen")
    assert status == 0, err
    row = json.loads((tmp_path / "seen/predictions.json").read_text())[0]
    shares = {entry["class"]: entry["probability"] for entry in row["top"]}
    assert sum(shares.values()) != pytest.approx(1, abs=0.01)
    assert row["classes"] == [name for name in shares if shares[name] >= 0.5]
    status, _, err = diffkd("train", *words[:-1], "data.bad=true", "output=bad")
    assert status == 2
    assert "targets are not of 0 to 1 (found: 3)" in err


def test_loss_is_binary_cross_entropy_and_figures_are_average_precisions():
    scores, rows = torch.randn(64, 4), (torch.rand(64, 4) < 0.3).long()
    rows[:, 2] = 0
    found = task()
    loss = found.loss(scores, batch(rows))["binary_cross_entropy"]
    assert torch.equal(loss, F.binary_cross_entropy_with_logits(scores, rows.float()))
    smooth = task(label_smoothing=0.2).loss(scores, batch(rows))["binary_cross_entropy"]
    assert torch.allclose(smooth, F.binary_cross_entropy_with_logits(scores, rows * 0.8 + 0.1))
    metrics = found.metrics()
    for part in (slice(0, 40), slice(40, 64)):
        found.update(metrics, scores[part], batch(rows[part]))
    computed = metrics.compute()
    expected = [average_precision_score(rows[:, k], scores[:, k]) for k in (0, 1, 3)]
    assert computed["ap"][[0, 1, 3]].tolist() == pytest.approx(expected, abs=1e-5)
    assert computed["ap"][2].isnan()
    assert computed["map"].item() == pytest.approx(sum(expected) / 3, abs=1e-5)
    hits = ((scores > 0) & (rows == 1)).sum()
    f1 = 2 * hits / ((scores > 0).sum() + rows.sum())
    assert computed["f1"].item() == pytest.approx(f1.item(), abs=1e-6)
    assert torch.equal(found.answers(scores), (scores > 0).long())
    assert found.chance is None


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (
            torch.zeros(4, dtype=torch.long),
            "the targets are int64 (4,); task.multi_label needs targets (B, 4)",
        ),
        (torch.full((4, 4), 2), "a target holds 2; task.multi_label needs targets (B, 4) of 0 and 1"),
        (torch.full((4, 4), float("nan")), "a target holds nan"),
        (["red"], "the targets are a list"),
    ],
)
def test_targets_of_another_kind_are_named(targets, words):
    with pytest.raises(UserError) as caught:
        task().check_data(lambda split: targets)
    assert words in str(caught.value)


def test_mixup_blends_rows_and_a_wrong_row_teaches_nothing():
    rows = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]])
    mixed = mix_batch(batch(rows), 4, 0.8, 0.0, torch.Generator().manual_seed(0)).targets
    assert torch.allclose(mixed.sum(1), torch.tensor([2.0, 2.0]))
    assert 0 < mixed[0, 0] < 1
    found = task()
    assert found.loss(torch.zeros(2, 4), batch(mixed))["binary_cross_entropy"].isfinite()
    found.check_seen()
    found.loss(torch.zeros(2, 4), batch(torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0]])))
    with pytest.raises(UserError, match="1 targets are not of 0 to 1"):
        found.check_seen()


def models():
    return [build(f"simple/cnn{w}", num_classes=4, image_shape=(3, 8, 8)) for w in (2, 4)]


def test_distilling_scores_is_binary_and_features_are_distilled_as_ever():
    torch.manual_seed(0)
    ours, theirs = torch.randn(5, 4), torch.randn(5, 4)
    p, q = (theirs / 2).sigmoid(), (ours / 2).sigmoid()
    slow = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert binary_divergence(ours, theirs, 2.0).item() == pytest.approx(4 * slow.mean().item(), rel=1e-5)
    images = torch.rand(4, 3, 8, 8)
    student, teacher = models()
    distiller = Distiller(student, teacher, None, "kd+diffkd", images, task=task(), num_classes=4)
    losses = distiller(batch(torch.ones(4, 4), images))
    assert sorted(losses) == ["diffkd.stage3.diffusion", "diffkd.stage3.kd", "kd.output.kd"]
    expected = 0.9 * binary_divergence(losses.output, teacher(images), 4.0)
    assert torch.allclose(losses["kd.output.kd"], expected, rtol=1e-4)


@pytest.mark.parametrize("method", ["dist", "dkd", "mlkd", "ofa"])
def test_methods_that_need_a_softmax_are_refused(method):
    student, teacher = models()
    with pytest.raises(UserError, match=r"through a softmax, which task.multi_label has not: use kd"):
        Distiller(student, teacher, None, method, torch.rand(4, 3, 8, 8), task=task(), num_classes=4)


def test_a_limit_takes_some_of_every_class_and_weights_reach_the_loss():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    split = ArraySplit(torch.zeros(100, 3, 8, 8), labels)
    data = Data(split, split, 3, (3, 8, 8))
    assert data.limited(20).train.targets.bincount().tolist() == [12, 6, 2]
    assert len(data.limited(0.5).train) == 50
    assert "data.limit: 50 of 100 training samples are used" in data.limited(0.5).notes
    assert data.limited(1000) is data
    assert (some(100, 7) == some(100, 7)).all()
    weighted = data.weighted("balanced")
    assert weighted.class_weights == pytest.approx((100 / 180, 100 / 90, 100 / 30))
    assert "weights of classes in the loss: 0 0.556, 1 1.11, 2 3.33" in weighted.notes
    scores, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = Classification(weighted).loss(scores, batch(targets))["cross_entropy"]
    assert torch.allclose(loss, F.cross_entropy(scores, targets, torch.tensor(weighted.class_weights)))
    with pytest.raises(UserError, match="2 weights for 3 classes"):
        data.weighted([1.0, 2.0])
