"""A data set read as it comes: the same samples whatever the processes, the same bits after a stop."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.data.base import Loader, build
from diffkd.errors import UserError
from diffkd.recipe.schema import load
from diffkd.runs.console import Reporter
from diffkd.runs.content import digests
from diffkd.training.fit import fit
from diffkd.training.interrupt import InterruptedRunError
from test_unlabelled import stop_at

datasets = pytest.importorskip("datasets")


def png(value):
    content = io.BytesIO()
    Image.fromarray(np.full((9, 7, 3), value, np.uint8)).save(content, "png")
    return {"bytes": content.getvalue(), "path": None}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Parquet files as the Hub has them: 2 of 11 rows to train on, one of 4 to test on."""
    place = tmp_path_factory.mktemp("stream")
    (place / "pets").mkdir()
    kinds = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(), "label": kinds})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        for name, first, count in (("train-0", 0, 11), ("train-1", 11, 11), ("validation-0", 100, 4)):
            rows = {"image": [], "label": []}
            for i in range(first, first + count):
                rows["image"].append(png(i))
                rows["label"].append(i % 2)
            found = datasets.Dataset.from_dict(rows, features=features)
            found.to_parquet(place / "pets" / f"{name}.parquet")
        yield place


def streamed(place, **options):
    given = {"streaming": True, "train_size": 22, "shuffle_buffer": 6, "image_size": 8, "augment": "none"}
    return build("huggingface", str(place / "pets"), given | options)


def values(batch):
    return batch.images[:, 0, 4, 4].tolist()


def test_an_epoch_is_shuffled_by_its_seed_whatever_the_processes_and_the_start(place):
    data = streamed(place)
    assert (len(data.train), len(data.test), data.class_names) == (22, 4, ("cat", "dog"))
    assert data.notes[0].endswith("is streamed; the 4 test pictures are in memory (0.0 MB)")
    assert [int(data.test[i][0][0, 4, 4]) for i in (3, 0)] == [103, 100]
    whole = list(Loader(data.train, 4, shuffle=True, seed=1).epoch(2))
    seen = [value for batch in whole for value in values(batch)]
    assert len(seen) == len(set(seen)) == 20
    assert seen != sorted(seen)
    assert all(torch.equal(b.images[:, 0, 4, 4] % 2, b.targets) and b.indices is None for b in whole)
    again = list(Loader(data.train, 4, shuffle=True, seed=1, workers=1).epoch(2, start=3))
    assert [values(b) for b in again] == [values(b) for b in whole[3:]]
    shares = [Loader(data.train, 4, shuffle=True, seed=1, rank=r, world_size=2) for r in (0, 1)]
    for batch, *parts in zip(whole, *(share.epoch(2) for share in shares), strict=True):
        assert [values(part) for part in parts] == [values(batch)[::2], values(batch)[1::2]]
    other = next(Loader(data.train, 4, shuffle=True, seed=1).epoch(3))
    assert values(other) != values(whole[0])
    plain = [v for b in Loader(data.train, 8, shuffle=False).epoch() for v in values(b)]
    assert plain == list(range(22))
    few = data.limited(0.25)
    assert sorted(v for b in Loader(few.train, 2, shuffle=True).epoch() for v in values(b)) == list(range(6))
    assert "data.limit: the first 6 of 22 training samples are used" in few.notes


def test_what_a_stream_cannot_do_is_one_line(place):
    for words, options in {
        "does not say how many rows it has: data.train_size=N": {"train_size": None},
        "has no split 'exam'": {"test_split": "exam"},
        "leave out data.max_corrupt": {"max_corrupt": 2},
        "data.shuffle_buffer=0 must be": {"shuffle_buffer": 0},
        "there are 2 classes": {"num_classes": 3},
    }.items():
        with pytest.raises(UserError, match=words):
            streamed(place, **options)
    with pytest.raises(UserError, match=r"train' ended after 22 of 30 rows: data\.train_size=22"):
        list(Loader(streamed(place, train_size=30).train, 4, shuffle=True).epoch())
    for words, more in {
        "nothing can be held out of a stream": {"val_fraction": 0.2},
        "does not say how it would see other pictures": {"unlabelled": str(place)},
        "data.class_weights=balanced: the samples' classes are not listed": {"class_weights": "balanced"},
    }.items():
        if "unlabelled" in more:
            Image.new("RGB", (8, 8)).save(place / "a.png")
        with pytest.raises(UserError, match=words):
            build("huggingface", str(place / "pets"), {"streaming": True, "train_size": 22}, **more)


def test_its_first_rows_tell_a_stream_from_others(place):
    first, again = (digests(streamed(place), None) for _ in range(2))
    assert first == again
    other = digests(streamed(place, train_size=21), None)
    assert other["training pictures"] != first["training pictures"]


RUN = ["data=huggingface", "data.streaming=true", "data.train_size=22", "data.shuffle_buffer=6"]
RUN += ["data.root=pets", "data.image_size=16", "data.batch_size=4", "data.workers=0"]
RUN += ["teacher.model=simple/cnn4", "student=simple/cnn2", "taps=null", "teacher.train=null"]
RUN += ["trainer.accelerator=cpu", "trainer.threads=1", "trainer.epochs=2"]


def test_a_stopped_run_goes_on_to_the_same_bits(place, monkeypatch):
    monkeypatch.chdir(place)

    def run(output, *more):
        return fit(load("folder", [*RUN, "method=kd", f"output={output}", *more]), Reporter(quiet=True))

    whole = run("whole")
    with pytest.raises(InterruptedRunError):
        stop_at(monkeypatch, 8, lambda: run("broken"))
    broken = run("broken", "resume=true")
    assert whole.student_file.read_bytes() == broken.student_file.read_bytes()
    with pytest.raises(UserError, match="method 'crd' remembers a vector of every training sample"):
        run("crd", "method=crd")
