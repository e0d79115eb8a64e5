"""Data sets of picture files: folders, lists, other libraries' sets; corrupt pictures in them."""

import re
import struct
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.data.base import Loader, builder
from diffkd.errors import UserError
from diffkd.pictures.decoding import ENDINGS
from picture_cases import GREEN, RED, build, error, paint, tree

# folders


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_split_folders(tmp_path, name):
    tree(tmp_path / "train")
    tree(tmp_path / name, count=2)
    data = build(tmp_path)
    assert (len(data.train), len(data.test), data.num_classes, data.image_shape) == (8, 4, 2, (3, 8, 8))
    assert data.class_names == ("cat", "dog")
    (note,) = data.notes
    assert "4 of 4 test pictures looked at are training pictures too" in note
    assert [target for _, target in (data.test[i] for i in range(4))] == [0, 0, 1, 1]
    batch = next(Loader(data.train, 8, shuffle=True).epoch())
    assert (batch.images.shape, batch.images.dtype) == ((8, 3, 8, 8), torch.uint8)
    assert torch.equal(batch.images[:, 1, 4, 4] > 128, batch.targets == 1)


def test_class_folders_alone_are_split_by_class_the_same_way_each_time(tmp_path):
    tree(tmp_path, count=10)
    paint(tmp_path / "cat" / "deep" / "UPPER.JPEG")
    paint(tmp_path / "cat" / ".hidden.png")
    (tmp_path / "cat" / "notes.txt").touch()
    data, again = build(tmp_path, val_fraction=0.2), build(tmp_path, val_fraction=0.2)
    assert (len(data.train), len(data.test)) == (17, 4)
    assert [data.test[i][1] for i in range(4)] == [0, 0, 1, 1]
    assert np.array_equal(data.test.source.places, again.test.source.places)
    assert "4 of its 21 pictures" in data.notes[0]


def test_a_choice_of_test_folders_is_told(tmp_path):
    tree(tmp_path / "train")
    tree(tmp_path / "test", count=1)
    tree(tmp_path / "val", count=2)
    data = build(tmp_path)
    assert len(data.test) == 4
    assert "'test'" in data.notes[0]
    assert len(build(tmp_path, test_folder="test").test) == 2
    assert "data.test_folder='x'" in error(tmp_path, test_folder="x")


def test_unlabelled_pictures(tmp_path):
    for i in range(6):
        paint(tmp_path / f"{i}.png")
    data = build(tmp_path, labels="none", num_classes=5, val_fraction=0.5)
    assert (len(data.train), data.num_classes) == (3, 5)
    batch = next(Loader(data.train, 3, shuffle=True).epoch())
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.targets is None
    assert "data.num_classes=K" in error(tmp_path, labels="none")
    assert "pictures but no class folders" in error(tmp_path)


def test_unlabelled_training_pictures_are_tested_on_labelled_ones(tmp_path):
    tree(tmp_path / "train", classes=("2023",))
    tree(tmp_path / "val")
    data = build(tmp_path, labels="none")
    assert isinstance(data.train[0], torch.Tensor)
    assert data.test[7][1] == 1
    assert data.class_names == ("cat", "dog")
    assert "data.num_classes=3" in error(tmp_path, labels="none", num_classes=3)


def test_folders_that_do_not_fit_are_named(tmp_path):
    assert "no pictures" in error(tmp_path)
    assert "no pictures" in error(tmp_path, labels="none")
    tree(tmp_path / "val", classes=("cat", "cow", "emu"), colours=(RED, RED, RED))
    assert "none named 'train'" in error(tmp_path)
    tree(tmp_path / "train")
    message = error(tmp_path)
    assert "lacks 'dog'" in message
    assert "has also 'cow', 'emu'" in message
    (tmp_path / "train" / "ant").mkdir()
    assert "'ant'" in error(tmp_path)


# corrupt pictures


def test_corrupt_pictures_are_named_skipped_and_counted_once_each(tmp_path):
    tree(tmp_path / "train")
    tree(tmp_path / "val")
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"")
    (tmp_path / "train" / "dog" / "3.png").write_bytes(b"no picture")
    train = build(tmp_path, max_corrupt=2, augment="none").train
    with pytest.warns(UserWarning, match="skipped") as told:
        epoch = [train[i] for i in range(8)]
    assert [str(w.message).split("'")[1][-9:] for w in told] == ["cat/1.png", "dog/3.png"]
    assert torch.equal(epoch[1][0], epoch[2][0])
    assert epoch[7][1] == 0  # the next readable one is the first of all
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len([train[i] for i in range(8)]) == 8
    train = build(tmp_path, max_corrupt=1).train
    with pytest.warns(UserWarning, match="1 of at most 1"):
        _ = train[1]
    with pytest.raises(UserError, match=r"dog/3\.png.*max_corrupt=2"):
        _ = train[7]


@pytest.mark.filterwarnings("ignore:cannot read")
def test_a_folder_of_nothing_but_corrupt_pictures_ends(tmp_path):
    tree(tmp_path / "train")
    tree(tmp_path / "val")
    for path in (tmp_path / "train").glob("*/*"):
        path.write_bytes(b"")
    train = build(tmp_path, max_corrupt=99).train
    with pytest.raises(UserError, match="not one"):
        _ = train[0]


@pytest.mark.filterwarnings("ignore:cannot read")
def test_processes_give_the_same_batches_count_corrupt_files_together_and_report_in_one_line(tmp_path):
    tree(tmp_path / "train", count=8)
    tree(tmp_path / "val")
    data = build(tmp_path, augment="randaugment")
    alone, together = (
        [b.images for b in Loader(data.train, 4, shuffle=True, workers=w).epoch(1)] for w in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    for name in ("cat/1.png", "cat/2.png"):
        (tmp_path / "train" / name).write_bytes(b"")
    train = build(tmp_path, max_corrupt=1).train
    try:  # pytest.raises would keep the loader's processes until the collector comes
        list(Loader(train, 1, shuffle=True, workers=2).epoch())
        message = ""
    except UserError as error:
        message = str(error)
    assert re.fullmatch(r"cannot read picture '.*[12]\.png': .* data\.max_corrupt=2 or more", message)


# lists


def write_csv(path, *rows, header="path,label"):
    path.write_text("\n".join([header, *rows]) + "\n")


def test_lists_with_names_of_classes(tmp_path):
    tree(tmp_path / "images")
    write_csv(tmp_path / "train.csv", "images/dog/0.png,dog", "images/cat/0.png,cat", "images/cat/1.png,cat")
    write_csv(tmp_path / "test.csv", "images/dog/1.png,dog")
    data = build(tmp_path, "table")
    assert (len(data.train), data.num_classes, data.class_names) == (3, 2, ("cat", "dog"))
    assert [data.train[i][1] for i in range(3)] == [1, 0, 0]
    image, target = data.test[0]
    assert target == 1
    assert image[1, 4, 4] == GREEN[1]


def test_lists_with_class_indices_other_columns_and_a_held_out_share(tmp_path):
    tree(tmp_path, count=10)
    rows = [
        f"x,{tmp_path}/{name}/{i}.png,{label}" for name, label in (("cat", 0), ("dog", 4)) for i in range(10)
    ]
    write_csv(tmp_path / "train.csv", *rows, header="id,file,kind")
    data = build(tmp_path, "table", path_column="file", label_column="kind")
    assert (len(data.test), data.num_classes, data.class_names) == (2, 5, ())
    assert [data.test[i][1] for i in range(2)] == [0, 4]
    assert "2 of its 20" in data.notes[0]
    unlabelled = build(tmp_path, "table", path_column="file", labels="none", num_classes=9)
    assert isinstance(unlabelled.train[0], torch.Tensor)
    assert unlabelled.num_classes == 9


def test_lists_that_do_not_fit_are_named(tmp_path):
    tree(tmp_path)
    assert "no file" in error(tmp_path, "table")
    good = ["cat/0.png,1", "dog/0.png,0"]
    for rows, header, options, words in [
        (["cat/0.png,1"], "path,lable", {}, "no column 'label'; did you mean 'lable'"),
        ([], "path,label", {}, "lists no pictures"),
        (["cat/0.png,"], "path,label", {}, "no label in row 2"),
        ([*good, "cat/99.png,0"], "path,label", {}, "'cat/99.png'"),
        ([*good, "cat/1.png,-1"], "path,label", {}, "label '-1' in row 4"),
        (good, "path,label", {"num_classes": 1}, "label '1' in row 2"),
        (["cat/0.png,cat"], "path,label", {"num_classes": 3}, "data.num_classes=3"),
    ]:
        write_csv(tmp_path / "train.csv", *rows, header=header)
        message = error(tmp_path, "table", **options)
        assert words in message
        assert "train.csv" in message or "num_classes" in message
    write_csv(tmp_path / "train.csv", "cat/0.png,cat", "dog/0.png,dog")
    write_csv(tmp_path / "test.csv", "dog/1.png,cow")
    assert "label 'cow' in row 2" in error(tmp_path, "table")
    (tmp_path / "train.csv").write_bytes(b"path,label\n\xff\xfe,\x00")
    assert "cannot read" in error(tmp_path, "table")


# torchvision


def test_torchvision_sets_with_splits(tmp_path):
    from torchvision import datasets

    for split in ("train", "t10k"):
        folder = tmp_path / "FashionMNIST" / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.full((3, 28, 28), 77, np.uint8)
        shape = struct.pack(">4i", 0x803, 3, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(shape + pixels.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 3) + bytes([0, 5, 9]))
    data = build(tmp_path, "torchvision", dataset="FashionMNIST", augment="crop")
    assert (len(data.train), data.num_classes, data.class_names[9]) == (3, 10, "Ankle boot")
    image, target = data.test[1]
    assert target == 5
    assert (image == 77).all()
    assert data.class_names == tuple(datasets.FashionMNIST.classes)


def test_torchvision_sets_without_splits(tmp_path):
    tree(tmp_path / "eurosat" / "2750", count=10)
    data = build(tmp_path, "torchvision", dataset="EuroSAT", val_fraction=0.2)
    assert (len(data.train), len(data.test), data.class_names) == (16, 4, ("cat", "dog"))
    assert [data.test[i][1] for i in range(4)] == [0, 0, 1, 1]
    (tmp_path / "eurosat" / "2750" / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="EuroSAT"):
        _ = [split[i] for split in (data.train, data.test) for i in range(len(split))]


def test_torchvision_sets_that_are_not_there(tmp_path):
    assert "did you mean 'Food101'" in error(tmp_path, "torchvision", dataset="Food-101")
    assert str(tmp_path) in error(tmp_path, "torchvision", dataset="Food101")


def test_every_torchvision_set_that_is_offered_exists():
    import inspect

    from torchvision import datasets

    from diffkd.data.torchvision import _SPLITS

    for name, splits in _SPLITS.items():
        takes = inspect.signature(getattr(datasets, name)).parameters
        keyword = "train" if splits and isinstance(splits[0], bool) else "split"
        assert (keyword in takes) == (splits is not None), name


# Hugging Face


class Rows:
    """As much of a data set of the `datasets` library as is used."""

    def __init__(self, columns, features):
        self.columns, self.features = columns, features

    def cast_column(self, column, feature):
        assert not feature.decode
        return self

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {k: v[key] for k, v in self.columns.items()}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the `datasets` library; a dict of the splits that it gives."""

    class ClassLabel:
        names = ("cat", "dog")

    class Image:
        def __init__(self, decode=True):
            self.decode = decode

    pictures = [paint(tmp_path / f"{i}.png", colour) for i, colour in enumerate((RED, GREEN))]
    stored = [{"bytes": pictures[0].read_bytes(), "path": None}, {"bytes": None, "path": str(pictures[1])}]
    features = {"photo": Image(), "kind": ClassLabel(), "id": object()}

    def rows(labels):
        return Rows({"photo": [stored[y] for y in labels], "kind": labels, "id": labels}, features)

    splits = {"train": rows([0, 1, 1, 0]), "validation": rows([1, 0]), "odd": rows([-1])}

    def load_dataset(name, subset, cache_dir=None):
        if name != "me/pets":
            raise FileNotFoundError(f"no {name}\non the Hub")
        return splits

    library = types.ModuleType("datasets")
    library.load_dataset, library.Image = load_dataset, Image
    monkeypatch.setitem(sys.modules, "datasets", library)
    return splits


def hugging(**options):
    return builder("huggingface")(None, **{"dataset": "me/pets", "image_size": 8, **options})


def test_hugging_face_sets(hub):
    data = hugging()
    assert (len(data.train), len(data.test), data.num_classes, data.class_names) == (4, 2, 2, ("cat", "dog"))
    image, target = data.test[0]
    assert target == 1
    assert image[1, 4, 4] == GREEN[1]
    unlabelled = hugging(labels="none")
    assert isinstance(unlabelled.train[0], torch.Tensor)
    assert unlabelled.test[0][1] == 1
    del hub["validation"]
    assert len(hugging(val_fraction=0.5).test) == 2


def test_hugging_face_sets_that_do_not_fit(hub, monkeypatch):
    for options, words in [
        ({"first_label": 1}, "holds no class indices of 1 or more"),
        ({"dataset": "me/birds"}, "'me/birds' cannot be loaded: no me/birds"),
        ({"dataset": None}, "data.dataset=NAME"),
        ({"train_split": "trian"}, "did you mean 'train'"),
        ({"test_split": "exam"}, "no split 'exam'"),
        ({"test_split": "odd"}, "no class indices"),
        ({"image_column": "foto"}, "did you mean 'photo'"),
        ({"num_classes": 3}, "there are 2 classes"),
    ]:
        with pytest.raises(UserError, match=words):
            hugging(**options)
    hub["train"].features = {"photo": None, "kind": None}
    with pytest.raises(UserError, match=r"data\.image_column= one of photo, kind"):
        hugging()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'diffkd\[huggingface\]'"):
        hugging()


def test_hugging_face_library_itself(tmp_path):
    datasets = pytest.importorskip("datasets")
    tree(tmp_path / "photos" / "train")
    tree(tmp_path / "photos" / "test", count=2)
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    data = builder("huggingface")(str(tmp_path / "photos"), image_size=8)
    assert (len(data.train), len(data.test), data.class_names) == (8, 4, ("cat", "dog"))
    batch = next(Loader(data.train, 8, shuffle=True).epoch())
    assert torch.equal(batch.images[:, 1, 4, 4] > 128, batch.targets == 1)


def test_endings_are_those_of_formats_that_can_be_read():
    Image.init()
    assert set(ENDINGS) <= set(Image.registered_extensions())
