"""Rows of Arrow tables as people have them: names in the place of numbers, lists, nothing."""

import pytest
from PIL import Image

from diffkd.data.base import builder
from diffkd.errors import UserError
from diffkd.pictures.decoding import decode

datasets = pytest.importorskip("datasets")


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def build(labels, test=None, kind="string", pictures=None, column="label"):
        for split, values in (("train", labels), ("test", test or labels)):
            images = pictures or [Image.new("RGB", (20, 20), (i, 0, 0)) for i in range(len(values))]
            shown = datasets.Image()
            what = datasets.Sequence(datasets.Value("int64")) if kind == "list" else datasets.Value(kind)
            features = datasets.Features({"image": shown, column: what})
            rows = datasets.Dataset.from_dict({"image": images, column: values}, features=features)
            (tmp_path / "rows").mkdir(exist_ok=True)
            rows.to_parquet(str(tmp_path / "rows" / f"{split}.parquet"))
        return builder("huggingface")(str(tmp_path / "rows"), image_size=8)

    return build


def test_names_of_classes_are_numbered_by_the_alphabet(build):
    data = build(["dog", "cat", "dog", "cat"], ["cat", "dog"])
    assert data.class_names == ("cat", "dog")
    assert [data.train[i][1] for i in range(4)] == [1, 0, 1, 0]
    assert [data.test[i][1] for i in range(2)] == [0, 1]
    with pytest.raises(UserError, match="classes that the training rows lack: 'emu'"):
        build(["dog", "cat"], ["cat", "emu"])


def test_columns_that_hold_no_classes_are_named(build):
    assert build([0, 1, 1], kind="int64", column="target").num_classes == 2
    with pytest.raises(UserError, match="holds lists, where a class index belongs"):
        build([[0, 1], [1]], kind="list")
    with pytest.raises(UserError, match=r"no class indices of 0 or more; data\.first_label"):
        build([0, None, 1], kind="int64")


def test_a_row_without_a_picture_is_unreadable(build):
    data = build([0, 1], kind="int64", pictures=[Image.new("RGB", (20, 20)), None])
    (line,) = data.test.unreadable()
    assert line.endswith("test 1': the row has none")
    assert decode(data.test.source[0].picture, "a").size == (20, 20)
