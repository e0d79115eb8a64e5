"""Pictures in tar files: what is a sample, read in place; damaged, compressed and odd ones in one line."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.data.base import Loader
from diffkd.pictures.shards import Shards
from diffkd.recipe.schema import load
from diffkd.runs.content import digests
from picture_cases import build, error


def png(value, size=(9, 7)):
    content = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(content, "png")
    return content.getvalue()


def shard(place, members):
    """A tar file of members by name."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, "w") as tar:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return place


def samples(start, count, label=str, ending="cls"):
    """Members of `count` samples, whose pictures show their number, in two classes."""
    found = {}
    for i in range(start, start + count):
        found |= {f"a.b/{i:03}.png": png(i), f"a.b/{i:03}.{ending}": label(i % 2)}
    return found


@pytest.fixture
def place(tmp_path):
    for k in range(3):
        shard(tmp_path / f"train-{k:02}.tar", samples(10 * k, 10))
    shard(tmp_path / "val-00.tar", samples(100, 4))
    return tmp_path


def values(split, indices):
    return [int(split[i][0][0, 4, 4]) for i in indices]


def test_a_folder_and_patterns_are_read_in_place_in_any_order(place):
    data = build(place, "webdataset")
    assert (len(data.train), len(data.test), data.num_classes, data.class_names) == (30, 4, 2, ())
    assert values(data.train, [29, 0, 13]) == [29, 0, 13]
    assert data.train.source.targets.tolist() == [0, 1] * 15
    batch = next(Loader(data.train, 8, shuffle=True).epoch())
    assert torch.equal(batch.images[:, 0, 4, 4] % 2, batch.targets)
    assert data.train[13][1] == 1
    assert data.train.source.name(13) == f"{place}/train-01.tar: a.b/013.png"
    some = build(place / "train-{00..01}.tar", "webdataset", test="val-*.tar")
    assert (len(some.train), len(some.test)) == (20, 4)
    held = build(place / "train-*.tar", "webdataset", val_fraction=0.2)
    assert (len(held.train), len(held.test)) == (24, 6)
    assert "6 of its 30 pictures held out as one" in held.notes[0]


def test_labels_are_numbers_names_or_in_json_or_none(tmp_path):
    def built(label=str, ending="cls", **options):
        shard(tmp_path / "train.tar", samples(0, 4, label, ending))
        return build(tmp_path / "train.tar", "webdataset", val_fraction=0.5, **options)

    assert built(lambda i: str(i + 1), first_label=1).num_classes == 2
    named = built(["dog", "cat"].__getitem__)
    assert named.class_names == ("cat", "dog")
    assert named.train.source.source.targets.tolist() == [1, 0, 1, 0]
    assert built(lambda i: json.dumps({"class": i, "x": "y"}), "json").num_classes == 2
    told = built(lambda i: json.dumps({"kind": "ab"[i]}), "json", label_field="kind")
    assert told.class_names == ("a", "b")
    assert built(lambda i: f" {'ab'[i]}\n", "txt", label_ending="txt").class_names == ("a", "b")
    bare = built(labels="none", num_classes=5)
    assert isinstance(bare.train[0], torch.Tensor)
    assert bare.num_classes == 5


def test_what_is_no_whole_sample_is_counted_and_said(tmp_path):
    odd = samples(0, 6) | {
        "x.png": png(1),
        "y.cls": "0",
        ".hidden": "",
        "notes": "",
        "z.JPG": png(2),
        "z.CLS": "1",
    }
    shard(tmp_path / "train.tar", odd)
    data = build(tmp_path / "train.tar", "webdataset", val_fraction=0.4)
    assert len(data.train) + len(data.test) == 7
    assert f"left out in '{tmp_path}/train.tar': 1 without a label (.cls), 1 without a picture" in data.notes


def test_the_index_is_kept_until_a_shard_changes(place, monkeypatch):
    monkeypatch.setattr("diffkd.pictures.shards._WORTH", -1)
    first = build(place, "webdataset")
    monkeypatch.setattr("diffkd.pictures.shards._grouped", None)  # nothing is read again
    again = build(place, "webdataset")
    assert values(again.train, range(30)) == values(first.train, range(30))
    before = digests(again, str(place))
    monkeypatch.undo()
    shard(place / "train-02.tar", samples(40, 9))
    changed = build(place, "webdataset")
    assert values(changed.train, [20, 28]) == [40, 48]
    after = digests(changed, str(place))
    assert before["training pictures"] != after["training pictures"]
    assert before["test pictures"] == after["test pictures"]
    moved = place / "moved"
    moved.mkdir()
    for path in place.glob("*.tar"):
        path.rename(moved / path.name)
    for root in (moved, moved / "train-*.tar"):
        found = build(root, "webdataset", **({} if root == moved else {"test": "val-00.tar"}))
        assert digests(found, str(root)) == after


BAD = {
    "cut": ("cannot read '{0}/train.tar' as a tar file: unexpected end of data", {}),
    "empty": ("cannot read '{0}/train.tar' as a tar file: empty file", {}),
    "text": ("cannot read '{0}/train.tar' as a tar file: ", {}),
    "gz": ("'{0}/train.tar' is compressed, so that no picture in it can be read alone: gunzip", {}),
    "bare": ("no label (.cls, .json) beside the pictures of '{0}/train.tar'", {}),
    "two": ("a.b/000.png' has 'png', 'jpg': data.image_ending= one of them", {}),
    "json": ("has no label in 'label', 'cls', 'class', 'class_name', 'target'; there are 'kind'", {}),
    "broken json": ("cannot read label '{0}/train.tar: a.b/000.json': ", {}),
    "nothing": ("no samples in '{0}/train.tar': 4 without a picture (.webp)", {"image_ending": "webp"}),
    "negative": ("a.b/000.png' has the label '-1', which is no class to train on", {"label_ending": "cls"}),
    "missing": ("no shard '{0}/train-7.tar'", {}),
    "shared": ("train.tar' is to train on and to test on", {"test": "*.tar"}),
    "web": ("reads shards of a disk that is mounted here, not https:", {}),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_read_is_one_line(what, tmp_path):
    root = tmp_path / "train.tar"
    good = samples(0, 4)
    members = {
        "two": good | {"a.b/000.jpg": png(0)},
        "bare": {name: content for name, content in good.items() if name.endswith("png")},
        "json": samples(0, 4, lambda i: '{"kind": 1}', "json"),
        "broken json": samples(0, 4, lambda i: '{"kind": 1', "json"),
        "negative": samples(0, 4, lambda i: str(i - 1)),
    }
    content = shard(root, members.get(what, good)).read_bytes()
    changed = {"cut": content[:1800], "empty": b"", "text": b"no tar " * 300, "gz": b"\x1f\x8b" + content}
    root.write_bytes(changed.get(what, content))
    root = {"missing": tmp_path / "train-{7..9}.tar", "web": "https://a/b.tar"}.get(what, root)
    line, options = BAD[what]
    assert line.format(tmp_path) in error(root, "webdataset", **options)


def test_an_unreadable_picture_is_named_and_the_command_line_needs_no_quoting_twice(place, tmp_path):
    shard(place / "train-03.tar", {"x.jpg": b"no picture", "x.cls": "0"})
    data = build(place, "webdataset")
    with pytest.raises(Exception, match=r"cannot read picture '.*train-03.tar: x.jpg': it is no picture"):
        data.train.sample(30)
    root = f"{place}/train-{{00..02}}.tar"
    assert load("folder", ["data=webdataset", f"data.root={root}", "data.test=val-00.tar"]).data.root == root
    assert isinstance(data.train.source, Shards)
