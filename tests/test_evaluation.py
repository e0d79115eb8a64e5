"""Where a student errs: figures against other people's, tables, pictures, the run's page."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from diffkd import UserError, load_student
from diffkd.batch import Batch
from diffkd.data.base import build
from diffkd.recipe.schema import load
from diffkd.report.evaluation import (
    Evaluation,
    LastEvaluation,
    evaluate_run,
    evaluation_folder,
    measure,
    write_evaluation,
)
from diffkd.report.faults.classification import ClassAccount
from diffkd.report.faults.detection import BoxAccount
from diffkd.report.faults.segmentation import MapAccount
from diffkd.report.faults.sheet import confusion_picture
from diffkd.report.run_page import finish_page
from diffkd.runs.console import Reporter
from diffkd.runs.folder import RunFolder
from diffkd.tasks.base import Figures
from diffkd.tasks.segmentation import Confusion
from diffkd.training.fit import fit
from diffkd.use.drawing import font

WORDS = ["trainer.max_steps=3", "method=none", "teacher=null", "trainer.accelerator=cpu", "trainer.threads=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps: it errs often."""
    place = tmp_path_factory.mktemp("runs") / "a"
    wanted = load("digits-8x8", [*WORDS, "data.val_fraction=0.1", f"output={place}"])
    last = LastEvaluation()
    folder = fit(wanted, Reporter(progress=False), last)
    finish_page(folder, last)
    return place


def test_the_last_evaluation_tells_what_another_one_would(run):
    seen = {place.name: place.read_bytes() for place in (run / "evaluation").iterdir()}
    assert {"figures.json", "classes.csv", "worst.png"} <= set(seen)
    write_evaluation(measure(RunFolder(run)), run / "again")
    assert seen == {place.name: place.read_bytes() for place in (run / "again").iterdir()}


def test_other_splits_have_an_account_of_their_own(run):
    own = (run / "evaluation/figures.json").read_bytes()
    for split, count in (("train", 1295), ("val", 142)):
        said = list(evaluate_run(str(run), [f"split={split}", "which=best"]))
        told = json.loads((run / f"evaluation-best-{split}/figures.json").read_text())
        assert (told["split"], told["student"], told["pictures"]) == (split, "best", count)
        assert said[1] == f"top1 {100 * told['figures']['top1']:.2f} %"
        assert said[-2] == f"where it errs: {run / f'evaluation-best-{split}'}"
        assert f'<a href="evaluation-best-{split}/classes.csv">' in (run / "run.html").read_text()
    history = RunFolder(run).read_history()
    assert told["figures"]["top1"] == max(row["val_top1"] for row in history)
    assert said[0] == "the validation samples stand for the test samples, which are not used"
    assert (run / "evaluation/figures.json").read_bytes() == own
    with pytest.raises(UserError, match="split=tset: needs test, val or train"):
        next(evaluate_run(str(run), ["split=tset"]))


def read(place):
    return list(csv.DictReader(place.open()))


def test_a_classifiers_errors_are_counted_as_others_count_them(run):
    said = list(evaluate_run(str(run)))
    assert said[0].endswith("as recorded)")
    assert said[-2:] == [f"where it errs: {run / 'evaluation'}", f"page: {run / 'run.html'}"]
    told = json.loads((run / "evaluation/figures.json").read_text())
    student, test = load_student(run), build("digits", None, {"shift": 1}).test
    batch = test.batch(torch.arange(len(test)), 0)
    shares = student.predict(list(batch.images)).softmax(1)
    sure, answers = (x.numpy() for x in shares.max(1))
    truth = batch.targets.numpy()
    matrix = confusion_matrix(truth, answers, labels=range(10))
    table = list(csv.reader((run / "evaluation/confusion.csv").open()))
    assert [row[1:] for row in table[1:]] == matrix.astype(str).tolist()
    precision, recall, f1, _ = precision_recall_fscore_support(truth, answers, zero_division=0)
    for i, row in enumerate(told["classes"]):
        assert (row["precision"] or 0) == pytest.approx(precision[i])
        assert (row["recall"], row["f1"] or 0) == pytest.approx((recall[i], f1[i]))
    bins = np.minimum((sure * 15).astype(int), 14)
    gaps = [abs((sure - (answers == truth))[bins == k].sum()) for k in range(15)]
    assert told["figures"]["ece"] == pytest.approx(sum(gaps) / len(truth), abs=1e-6)
    wrong = np.flatnonzero(answers != truth)
    surest = wrong[np.argsort(-sure[wrong], kind="stable")][:24]
    assert [row["confidence"] for row in told["worst"]] == pytest.approx(sure[surest].tolist(), abs=1e-6)
    assert [row["truth"] for row in told["worst"]] == [str(truth[i]) for i in surest]
    assert Image.open(run / "evaluation/worst.png").width > 400
    assert len(read(run / "evaluation/classes.csv")) == 10


def test_the_runs_page_shows_the_errors_and_what_to_do_next(run):
    page = finish_page(RunFolder(run)).read_text()
    assert page.count("data:image/png;base64,") == 3
    for word in ("Training without distillation reaches", "Where it errs", "diffkd export", "weight_decay"):
        assert word in page
    assert "{{" not in page.partition("<script")[0]


def test_other_data_are_told_of_and_go_elsewhere_on_request(run, tmp_path):
    for split, count in (("train", 1), ("test", 2)):
        for number in range(10 * count):
            place = tmp_path / "photos" / split / str(number % 10) / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((20, 16), 80 + number).save(place)
    words = ["data=folder", f"data.root={tmp_path / 'photos'}", "data.workers=0"]
    said = list(evaluate_run(str(run), [*words, f"output={tmp_path / 'found'}"]))
    told = json.loads((tmp_path / "found/figures.json").read_text())
    assert (told["overrides"], told["pictures"]) == (words, 20)
    assert said[0] == f"top1 {100 * told['figures']['top1']:.2f} %"
    assert not any("recorded" in line or line.startswith("page") for line in said)
    *_, where, page = evaluate_run(str(run), words)
    assert (where, page) == (f"where it errs: {run / 'evaluation-photos'}", f"page: {run / 'run.html'}")
    assert "20 pictures, with data=folder" in (run / "run.html").read_text()
    said = list(
        evaluate_run(str(run), ["data=folder", f"data.root={tmp_path / 'photos/test'}", "data.workers=0"])
    )
    assert "looked at: 20 pictures" in said
    assert "no test split: all 20 pictures are looked at" in said


def test_a_copy_of_the_runs_own_data_keeps_its_training_pictures_out(tmp_path):
    for number in range(40):
        place = tmp_path / "photos" / str(number % 2) / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 16), 80 + number).save(place)
    words = [f"data.root={tmp_path / 'photos'}", "data.image_size=32", "data.workers=0", "teacher=null"]
    words += ["student=simple/cnn2", "student.weights=null", "method=none", "trainer.epochs=1"]
    words += [f"output={tmp_path / 'run'}", "trainer.accelerator=cpu", "trainer.progress=false"]
    folder = fit(load("folder", words))
    (tmp_path / "photos").rename(tmp_path / "moved")
    said = list(evaluate_run(str(folder.path), [f"data.root={tmp_path / 'moved'}"]))
    assert "looked at: 4 pictures" in said
    assert any(line.endswith("4 of its 40 pictures held out as one") for line in said)
    for words, name in (
        (["data.limit=0.5", "data=folder"], "evaluation-folder-limit-0.5"),
        (["data.root=x/y z", "data=folder", "task.flip=true"], "evaluation-y-z-flip-true"),
        (["data.root=x", "data.workers=0"], "evaluation-x"),
        ([f"data.mean={'9' * 300}"], f"evaluation-mean-{'9' * 104}"),
    ):
        found = Evaluation({}, tuple(words), None, {}, Figures({}), None)
        assert evaluation_folder(folder, found) == folder.path / name
    with pytest.raises(UserError, match=r"evaluate takes data\.KEY"):
        next(evaluate_run(str(folder.path), ["seed=1"]))


def test_targets_left_out_count_nowhere_and_probabilities_by_their_largest():
    account = ClassAccount(["a", "b"])
    images, scores = torch.zeros(3, 1, 4, 4), torch.tensor([[9.0, 0], [9.0, 0], [0, 9.0]])
    account.add(Batch(images, torch.tensor([0, -100, 1]), torch.arange(3)), scores)
    account.add(Batch(images[:1], torch.tensor([[0.2, 0.8]]), torch.arange(1)), scores[:1])
    assert account.confusion.tolist() == [[1, 0], [1, 1]]
    assert [worst.facts["answer"] for worst in account.sheet()] == ["a"]


def test_label_maps_by_class_and_by_size_of_the_region(tmp_path):
    truth = torch.zeros(1, 120, 120, dtype=torch.uint8)
    truth[0, :10, :10], truth[0, 15:115, 15:115], truth[0, 119] = 1, 2, 255
    answer = truth.long().clone()
    answer[0, :10, :5], answer[0, 119] = 0, 0
    scores = torch.nn.functional.one_hot(answer, 3).permute(0, 3, 1, 2).float()
    task = type("Task", (), {"answers": lambda self, scores: scores.argmax(1)})()
    account, confusion = MapAccount(["ground", "nail", "board"], task), Confusion(3)
    batch = Batch(torch.zeros(1, 3, 120, 120, dtype=torch.uint8), truth, torch.tensor([7]))
    account.add(batch, scores)
    confusion.update(answer, truth)
    tables = account.tables(Figures.of(confusion.compute()))
    assert [row["recall"] for row in tables["classes"]] == [1.0, 0.5, 1.0]
    assert [(row["size"], row["regions"], row["recall"]) for row in tables["sizes"]] == [
        ("small", 1, 0.5),
        ("medium", 0, None),
        ("large", 1, 1.0),
    ]
    (worst,) = account.sheet()
    ground = (119 * 120 - 100 - 100 * 100) / (119 * 120 - 50 - 100 * 100)
    assert worst.facts["miou"] == pytest.approx((ground + 0.5 + 1) / 3, abs=1e-6)
    assert [image.shape for image in worst.images] == [(3, 120, 120)] * 3
    account.draw(tmp_path, Figures.of(confusion.compute()))
    assert Image.open(tmp_path / "confusion.png").width > 100


def test_boxes_found_missed_and_false_in_pixels_of_the_whole_picture():
    boxes = torch.tensor([[0.0, 0, 20, 20], [40, 40, 80, 80], [0, 60, 20, 80]])
    truth = {"boxes": boxes, "labels": torch.tensor([0, 1, 1]), "ignore": torch.tensor([False, False, True])}
    ours = {
        "boxes": torch.cat([boxes[:1], boxes[:1] + 1, boxes[2:], boxes[1:2]]),
        "scores": torch.tensor([0.8, 0.9, 0.7, 0.2]),  # the last one is not sure enough
        "labels": torch.tensor([0, 0, 1, 1]),
    }
    account = BoxAccount(["screw", "nut"])
    image = torch.zeros(3, 50, 50, dtype=torch.uint8)
    account.add(Batch([image], [truth | {"origin": (100, 100)}], torch.tensor([3])), [ours])
    screw, nut = account.tables(Figures({"ap_small": 0.5}, {"ap_per_class": [0.5, 0.0]}))["classes"]
    assert [screw[key] for key in ("ap", "objects", "found", "false")] == [0.5, 1, 1, 1]
    assert [nut[key] for key in ("objects", "found", "recall", "false")] == [1, 0, 0.0, 0]
    (worst,) = account.sheet()
    assert worst.index == 3
    assert [worst.facts[key] for key in ("found", "missed", "false", "f1")] == [1, 1, 1, 0.5]
    truth_seen = worst.images[0]  # boxes of a picture of 100 pixels, seen at 50, shown at 180
    assert truth_seen.shape == (3, 180, 180)
    assert truth_seen[:, 144, 108].any()
    assert not truth_seen[:, 148:].any()


def test_the_title_of_a_small_matrix_is_whole(tmp_path):
    confusion_picture(np.array([[5, 1], [2, 4]]), ["cat", "dog"], tmp_path / "a.png")
    drawn = np.asarray(Image.open(tmp_path / "a.png").convert("L"))[:20]
    assert (drawn[:, -8:] > 250).all()  # the title ends before the picture does
    title = np.flatnonzero((drawn < 200).any(0))
    assert title.max() - title.min() > font(12).getlength("truth down, answer across; shades are shares")
