"""Pictures without labels beside labelled ones: who learns from them, and who takes them for no class."""

import os
import re
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import mask_cases
from diffkd import Batch, Data
from diffkd.batch import UNLABELLED
from diffkd.data.base import Loader, build
from diffkd.errors import UserError
from diffkd.features.maps import label_maps
from diffkd.maths.losses import hard_targets
from diffkd.pictures.memory import ArraySplit
from diffkd.pictures.unlabelled import joined
from diffkd.recipe.schema import load
from diffkd.runs.console import Reporter
from diffkd.tasks.classification import Classification
from diffkd.tasks.segmentation import Segmentation
from diffkd.training.fit import fit
from diffkd.training.interrupt import InterruptedRunError
from diffkd.training.trainer import Trainer
from picture_cases import RED, paint, tree

FEW = {"image_size": 8}


def noise(place, count, size=(20, 24), seed=0):
    draw = np.random.default_rng(seed)
    place.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("unlabelled")
    for split, count in (("train", 6), ("val", 2)):
        for i, name in enumerate(("cat", "dog")):
            noise(place / "photos" / split / name, count, seed=10 * count + i)
    noise(place / "more" / "deep", 20, seed=3)
    (place / "more" / "notes.txt").write_text("no picture")
    return place


def beside(count, unlabelled, classes=3, **more):
    """Data of arrays with pictures without labels; a pixel tells which sample it is."""
    images = torch.arange(count + unlabelled, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    split = ArraySplit(images[:count], torch.arange(count) % classes)
    rest = ArraySplit(images[count:], torch.full((unlabelled,), UNLABELLED))
    return Data(split, split, classes, (1, 4, 4), unlabelled=rest, **more)


def test_every_batch_and_every_process_has_its_share_of_labelled_samples():
    data = beside(30, 90)
    split = joined(data.train, data.unlabelled)
    whole = list(Loader(split, 16, shuffle=True, labelled=30).epoch(3))
    assert {int((batch.targets >= 0).sum()) for batch in whole} == {4}
    seen = torch.cat([batch.indices for batch in whole])
    assert len(seen.unique()) == len(seen) == 112
    assert all(torch.equal(b.images[:, 0, 0, 0].long(), b.indices) for b in whole)
    assert all(torch.equal(b.targets == UNLABELLED, b.indices >= 30) for b in whole)
    parts = [
        list(Loader(split, 16, shuffle=True, labelled=30, rank=r, world_size=2).epoch(3)) for r in (0, 1)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert [int((s.targets >= 0).sum()) for s in shares] == [2, 2]
        both = torch.cat([s.indices for s in shares])
        assert torch.equal(both.sort().values, batch.indices.sort().values)
    again = next(Loader(split, 16, shuffle=True, labelled=30).epoch(3, start=5))
    assert torch.equal(again.indices, whole[5].indices)
    other = next(Loader(split, 16, shuffle=True, labelled=30).epoch(4))
    assert not torch.equal(other.indices, whole[0].indices)


@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 0.5)], ids=["alike", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_supervised_loss_is_that_of_the_labelled_pictures(weights, smoothing):
    torch.manual_seed(0)
    scores = torch.randn(6, 3, requires_grad=True)
    targets = torch.tensor([UNLABELLED, 0, 2, UNLABELLED, -100, 1])
    task = Classification(beside(4, 4, class_weights=weights), label_smoothing=smoothing)
    loss = task.loss(scores, Batch(None, targets))["cross_entropy"]
    known, weight = targets >= 0, torch.tensor(weights) if weights else None
    expected = F.cross_entropy(scores[known], targets[known], weight, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    task.check_seen()
    none = task.loss(scores, Batch(None, torch.full((6,), UNLABELLED)))["cross_entropy"]
    none.backward()
    assert none == 0
    assert not scores.grad.any()  # not nan, as a mean over nothing would be
    task.loss(scores, Batch(None, torch.tensor([0, 1, 2, UNLABELLED, -1, 5])))
    with pytest.raises(UserError, match="2 targets are neither classes of 0 to 2"):
        task.check_seen()


def test_of_several_classes_a_picture_the_labelled_rows_count():
    torch.manual_seed(0)
    scores, rows = torch.randn(4, 3), torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]])
    rows[1] = rows[3] = UNLABELLED
    task = Classification(beside(4, 4), multi_label=True)
    loss = task.loss(scores, Batch(None, rows))["binary_cross_entropy"]
    expected = F.binary_cross_entropy_with_logits(scores[::2], rows[::2])
    torch.testing.assert_close(loss, expected)
    task.check_seen()


def test_methods_take_the_teachers_class_where_there_is_no_label():
    scores = torch.tensor([[0.0, 3, 0], [5, 0, 0], [0, 0, 1]])
    labels, known = hard_targets(torch.tensor([2, UNLABELLED, -1]), scores)
    assert (labels.tolist(), known.tolist()) == ([2, 0, 0], [True, True, False])
    rows = torch.tensor([[0.2, 0.1, 0.7], [UNLABELLED] * 3, [0, 1, 0]])
    assert hard_targets(rows, scores)[0].tolist() == [2, 0, 1]
    # where classes of positions are compared, and no scores are at hand, they are left out
    maps = torch.tensor([[[0, 255], [1, 2]], [[UNLABELLED, UNLABELLED], [UNLABELLED, 255]]])
    found = label_maps(Batch(None, maps), torch.zeros(2, 8, 2, 2), 3)[1]
    assert found.flatten(1).tolist() == [[True, False, True, True], [False] * 4]


def test_files_are_seen_as_the_training_pictures_are(place):
    data = build("folder", str(place / "photos"), FEW, unlabelled=str(place / "more"))
    assert data.summary == "2 classes, 12 labelled + 20 unlabelled + 4 test pictures"
    assert f"left out in '{place / 'more'}': 1 .txt files" in data.notes
    assert data.unlabelled.transform is data.train.transform
    split = joined(data.train, data.unlabelled)
    (batch,) = Loader(split, 32, shuffle=True, labelled=12).epoch()
    assert (batch.targets == UNLABELLED).sum() == 20
    assert torch.equal(batch.targets == UNLABELLED, batch.indices >= 12)
    limited = build("folder", str(place / "photos"), FEW, limit=4, unlabelled=str(place / "more"))
    assert (len(limited.train), len(limited.unlabelled)) == (4, 20)
    copy = build("folder", str(place / "photos"), FEW, unlabelled=str(place / "photos"))
    assert any("4 of 4 test pictures looked at are training pictures too" in note for note in copy.notes)


def test_small_pictures_in_memory_and_their_size(tmp_path):
    tree(tmp_path / "train")
    tree(tmp_path / "val", count=2)
    for i in range(3):
        paint(tmp_path / "more" / f"{i}.png", RED)
    data = build("folder", str(tmp_path), {}, unlabelled=str(tmp_path / "more"))
    assert isinstance(data.unlabelled, ArraySplit)
    batch = next(Loader(joined(data.train, data.unlabelled), 11, shuffle=False).epoch())
    assert batch.targets.tolist() == [0] * 4 + [1] * 4 + [UNLABELLED] * 3
    assert batch.images[8:, 0, 5, 6].tolist() == [250] * 3
    paint(tmp_path / "more" / "odd.png", RED, size=(9, 9))
    with pytest.raises(UserError, match=r"odd.png' is 9x9, but the training pictures are 10x12 in memory"):
        build("folder", str(tmp_path), {}, unlabelled=str(tmp_path / "more"))


def test_segmentation_distils_where_there_is_no_mask_and_learns_only_from_masks(tmp_path, place):
    root = mask_cases.street(tmp_path)
    data = build("masks", str(root), {"crop_size": 32}, unlabelled=str(place / "more"))
    assert data.summary == "3 classes, 6 labelled + 20 unlabelled + 6 test pictures"
    split = joined(data.train, data.unlabelled)
    (batch,) = Loader(split, 26, shuffle=True, labelled=6, collate=data.collate).epoch()
    bare = (batch.targets == UNLABELLED).flatten(1).any(1)
    assert bare.tolist() == [False] * 6 + [True] * 20
    assert (batch.targets[bare] == 255).any(), "padding of small views stays void"
    task = Segmentation(data)
    framed = task.frame(batch)
    assert torch.equal(framed.valid, batch.targets != 255)
    scores = torch.randn(26, 3, 32, 32, requires_grad=True)
    loss = task.loss(scores, batch)["cross_entropy"]
    torch.testing.assert_close(
        loss, F.cross_entropy(scores[:6], batch.targets[:6], ignore_index=255, reduction="mean")
    )


REFUSED = {
    "folder data.unlabelled=nowhere": "data.unlabelled='.*nowhere' does not exist",
    "folder data.unlabelled=empty": "no pictures in data.unlabelled='.*empty'",
    "folder data.unlabelled=more data.mixup=0.2": "cannot mix pictures with a label and without",
    "folder data.unlabelled=more data.labels=none data.num_classes=2": "leave out data.unlabelled",
    "boxes.yaml": "task 'detection' needs a target for every picture",
    "boxes.yaml data=boxes data.unlabelled=more": "task 'detection' needs a target for every picture; leave",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_use_them_is_one_line(words, place, diffkd, monkeypatch):
    monkeypatch.chdir(place)
    (place / "empty").mkdir(exist_ok=True)
    (place / "boxes.yaml").write_text(
        "task: detection\ndata: {name: 'beside.py:build'}\nteacher: {model: simple/cnn4}\n"
        "student: {model: simple/cnn2}\nmethod: fitnet\n"
    )
    (place / "beside.py").write_text(
        "from test_unlabelled import beside\ndef build():\n    return beside(4, 4)\n"
    )
    recipe, *more = words.split()
    common = ["data.root=photos", "data.image_size=16"] if recipe == "folder" else ["trust=true"]
    status, _, err = diffkd("check", recipe, *common, *more)
    assert status == 2
    assert err.count("\n") == 1
    assert re.search(REFUSED[words], err), err


RUN = ["folder", "data.root=photos", "data.unlabelled=more", "data.image_size=16", "data.batch_size=8"]
RUN += ["teacher.model=simple/cnn4", "student=simple/cnn2", "method=dkd", "taps=null", "data.workers=0"]
RUN += ["trainer.accelerator=cpu", "trainer.threads=1", "trainer.epochs=2", "teacher.train.epochs=1"]


def test_a_run_tells_them_apart_makes_one_teacher_and_goes_on_to_the_same_bits(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("DIFFKD_CACHE", str(place / "cache"))
    said = []

    class Told(Reporter):
        def note(self, line):
            said.append(line)

    def run(output, *more):
        reporter = Told(progress=False)
        return fit(load(RUN[0], [*RUN[1:], f"output={output}", *more]), reporter)

    whole = run("whole")
    assert "data: 2 classes, 12 labelled + 20 unlabelled + 4 test pictures" in said
    assert "a batch of 8 holds 3 labelled pictures in the mean" in said
    assert "training pictures without labels" in whole.read_identity()["data"]
    assert whole.read_history()[-1]["step"] == 8
    assert {"task.cross_entropy", "dkd.output.target"} <= whole.read_history()[-1].keys()
    with pytest.raises(InterruptedRunError):
        stop_at(monkeypatch, 3, lambda: run("broken"))
    broken = run("broken", "resume=true")
    ours, theirs = load_file(whole.student_file), load_file(broken.student_file)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    run("bare", "data.unlabelled=null")  # the same teacher, which never saw them
    run("none", "method=none")
    assert "data.unlabelled serves nothing without a method: left out" in said
    assert len(list((place / "cache/teachers").glob("*/student"))) == 1


def stop_at(monkeypatch, step, run):
    """Runs and asks for a stop after so many optimizer steps."""
    plain = Trainer._after_update

    def after_update(trainer, place, bar, stop):
        if place.step == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return plain(trainer, place, bar, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_after_update", after_update)
        return run()
