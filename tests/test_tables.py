"""Lists of pictures as other programs write them, pictures of telephones, what `check` reads of them."""

import re
import sys
import types

import pytest

from diffkd.errors import UserError
from diffkd.pictures import decoding
from picture_cases import build, error, paint, tree


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("path|label\n{0}|x\n{1}|y\n{2}|x\n{3}|y\n", ("x", "y")),
        ("path;label\n{0};a, b\n{1};c\n{2};c\n{3};a, b\n", ("a, b", "c")),
        ("{0} x\n{1} y\n{2} x\n{3} y\n", ("x", "y")),
        ("# by hand\nImage_Name,Species\n{0},x\n{1},y\n{2},x\n{3},y\n", ("x", "y")),
        ("id,breed\n0,x\n1,y\n2,x\n3,y\n", ("x", "y")),
        ("path,label\n{0},0.0\n{1},1.0\n{2},0.0\n{3},1.0\n", ()),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_tables_as_others_write_them(tmp_path, text, names, encoding):
    files = [paint(tmp_path / f"{i}.png").name for i in range(4)]
    (tmp_path / "train.csv").write_text(text.format(*files), encoding=encoding)
    (tmp_path / "test.csv").write_text(text.format(*files), encoding=encoding)
    data = build(tmp_path, "table")
    assert (data.num_classes, data.class_names) == (2, names)
    assert [data.test[i][1] for i in range(4)] == ([0, 1, 1, 0] if ";" in text else [0, 1, 0, 1])
    assert data.train.source.paths == files


def told(data, *words):
    return any(all(word in note for word in words) for note in data.notes)


def listing(root, *rows, header="path,label", name="train.csv"):
    (root / name).write_text("\n".join([header, *rows]) + "\n")


def test_paths_of_another_place_are_found_and_said(tmp_path):
    tree(tmp_path / "img", count=2)
    files = [f"{name}/{i}" for name in ("cat", "dog") for i in (0, 1)]
    for start, words in (("C:\\data\\img\\", "'C:/data/' before"), ("/kaggle/img/", "'/kaggle/' before")):
        listing(tmp_path, *[f"{start}{path}.png,{path[:3]}" for path in files])
        data = build(tmp_path, "table")
        assert told(data, words)
        assert sorted(data.train.source.source.paths) == [f"img/{path}.png" for path in files]
    listing(tmp_path, *[f"{path},{path[:3]}" for path in files], header="id,breed")
    assert told(build(tmp_path, "table"), "paths begin in", "img'")
    listing(tmp_path, "img/cat/0.png,cat", "/other/img/cat/1.png,cat")  # only what holds for all
    assert "'/other/img/cat/1.png' in row 3" in error(tmp_path, "table")


def test_what_tables_say_besides_is_used_or_said(tmp_path):
    tree(tmp_path, count=4)
    rows = [
        f"{name}/{i}.png,{name} ,{'val' if i == 3 else 'Train'},7"
        for name in ("cat", "dog")
        for i in range(4)
    ]
    listing(tmp_path, *rows, "  ", "cat/3.png,cat,test,7", header="path,label,split,age")
    data = build(tmp_path, "table")
    assert (len(data.train), len(data.test), data.class_names) == (6, 2, ("cat", "dog"))
    assert not data.test_held_out
    assert told(data, "column of splits", "'train', 'val', not 'test'")
    assert told(data, "'age' is not used")
    assert told(data, "1 rows", "list a picture that another row lists")
    listing(tmp_path, "cat/0.png,cat", "cat/0.png,dog", "dog/0.png,Dog", "dog/1.png,dog")
    data = build(tmp_path, "table", val_fraction=0.5)
    assert told(data, "1 rows", "1 with another label")
    assert told(data, "'Dog' and 'dog' differ in capitals alone")
    listing(tmp_path, "cat/0.png,0.5", "cat/1.png,0.5", "dog/0.png,1.5", "dog/1.png,1.5")
    assert told(build(tmp_path, "table"), "taken for names of classes", "'0.5', '1.5'")


def test_no_row_is_lost_or_cut_in_silence(tmp_path):
    tree(tmp_path, count=4)
    rows = [f"{name}/{i}.png,{i % 2}" for name in ("cat", "dog") for i in range(4)]
    listing(tmp_path, *rows[1:], header=rows[0])  # labels that are called as files are
    data = build(tmp_path, "table", val_fraction=0.5)
    assert told(data, "names no columns: 'path', 'label'")
    assert not told(data, "paths begin in")
    assert sorted(data.train.source.source.paths) == [row[:9] for row in rows]
    for row, words in (
        ('cat/1.png,"cat', "row 3 of .*over several lines: a quotation mark"),
        ("cat/1.png,big cat, black", "row 3 of .*3 fields for 2 columns: put texts"),
        ("cat/1.png,NaN", "no label in row 3"),
    ):
        listing(tmp_path, "cat/0.png,dog,,", row, "dog/1.png,dog")
        assert re.search(words, error(tmp_path, "table"))
    split = [f"{row},{('train', 'val', '', 'later')[i % 4]}" for i, row in enumerate(rows)]
    listing(tmp_path, *split, header="path,label,split")
    assert told(build(tmp_path, "table"), "'train', 'val'; 4 rows that say '', 'later' are left out")


def test_the_file_to_test_on_has_many_names_and_perhaps_no_labels(tmp_path):
    tree(tmp_path, count=4)
    listing(
        tmp_path, *[f"{name}/{i}.png,{name}" for name in ("cat", "dog") for i in range(3)], name="Train.csv"
    )
    listing(tmp_path, "cat/3.png,cat", "dog/3.png,dog", name="validation.csv")
    assert len(build(tmp_path, "table").test) == 2
    listing(tmp_path, "0,cat/3.png", header="id,path", name="test.csv")
    data = build(tmp_path, "table")
    assert (len(data.test), told(data, "tested on 'validation.csv', not on 'test.csv'")) == (2, True)
    (tmp_path / "validation.csv").unlink()
    assert told(build(tmp_path, "table"), "'test.csv' has no labels, and is not used")
    assert "no column 'label'" in error(tmp_path, "table", test_file="test.csv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"PK\3\4" + bytes(99), "it is a spreadsheet or an archive"),
        ("path,label\n".encode("utf-16-le"), "holds zero bytes, as UTF-16 without its mark"),
        (b'[{"path": "a.png"}]', "it is JSON"),
        ("path,label\na.png,caf\xe9".encode("latin-1"), "not text in UTF-8"),
    ],
)
def test_what_is_no_table_is_called_what_it_is(tmp_path, content, words):
    (tmp_path / "train.csv").write_bytes(content)
    assert words in error(tmp_path, "table")


@pytest.fixture
def forgotten():
    """Whether pillow-heif is there is asked anew, before and after."""
    decoding.reads_heic.cache_clear()
    yield
    decoding.reads_heic.cache_clear()


def test_pictures_of_telephones_say_what_reads_them(tmp_path, monkeypatch, forgotten):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    tree(tmp_path)
    (tmp_path / "cat" / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(30))
    notes = build(tmp_path).notes
    assert any("1 .heic files (pip install pillow-heif reads them)" in note for note in notes)
    with pytest.raises(UserError, match=r"a.HEIC': pip install pillow-heif decodes it, or save it as JPEG"):
        decoding.decode(tmp_path / "cat" / "a.HEIC", "a.HEIC")
    opened = []
    opener = types.SimpleNamespace(register_heif_opener=lambda: opened.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", opener)
    decoding.reads_heic.cache_clear()
    data = build(tmp_path)
    assert (len(data.train) + len(data.test), opened) == (9, [1])


def test_check_looks_at_all_headers_and_decodes_on_request(tmp_path, diffkd):
    tree(tmp_path / "p", count=12)
    whole = (tmp_path / "p/cat/0.png").read_bytes()
    (tmp_path / "p/cat/11.png").write_bytes(whole[:-30])
    words = ["check", "folder", f"data.root={tmp_path / 'p'}", "data.image_size=8", "data.batch_size=4"]
    words += ["student=simple/cnn2", "method=none", "teacher=null", "data.workers=0"]
    data = build(tmp_path / "p")
    assert data.train.unreadable() + data.test.unreadable() == []
    status, _, err = diffkd(*words, "decode=true")
    assert (status, err.count("\n")) == (2, 1)
    assert "1 of 22 training pictures are unreadable: cannot read picture" in err
    assert "data.max_corrupt=1" in err
