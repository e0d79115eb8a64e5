"""Lists of pictures as other programs write them, pictures of telephones, what `check` reads of them."""

import sys
import types

import pytest

from diffkd.errors import UserError
from diffkd.pictures import decoding
from picture_cases import build, paint, tree


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
