"""Pictures of one's own code in every type that people have: used right, said, or refused in a line."""

import pytest
import torch

from diffkd.assembly import assemble, check_outputs
from diffkd.errors import UserError
from diffkd.recipe.schema import load

CODE = """
import torch
from diffkd import Data

class Split:
    def __init__(self, picture):
        self.picture = picture
    def __len__(self):
        return 20
    def __getitem__(self, index):
        picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index))
        return self.picture(picture), index % 3

PICTURES = {
    "float64": lambda x: x.double(),
    "numpy": lambda x: x.numpy(),
    "half": lambda x: x.half(),
    "uint16": lambda x: (x * 60000).to(torch.uint16),
    "bool": lambda x: x > 0.5,
    "last": lambda x: x.permute(1, 2, 0),
    "flat": lambda x: x[0],
    "bytes": lambda x: x * 255,
    "normal": lambda x: (x - 0.5) * 4,
}

def build(*, kind: str = "float64"):
    split = Split(PICTURES[kind])
    return Data(split, split, 3, (3, 16, 16), class_names=("a", "b", "c"))
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    (tmp_path / "pictures.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)

    def parts(kind):
        words = ["data=pictures.py:build", f"data.kind={kind}", "student=simple/cnn2", "teacher=null"]
        found = assemble(load("folder", [*words, "method=none"]))
        check_outputs(found, found.sample(2))
        return found

    return parts


@pytest.mark.parametrize("kind", ["float64", "numpy", "half"])
def test_floating_point_of_0_to_1_is_taken_as_it_is(parts, kind):
    found = parts(kind)
    assert found.data.notes == ()
    batch = found.sample(2)
    prepared = found.student.prepare(batch.images)
    assert torch.allclose(prepared.float(), batch.images.float() * 2 - 1, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("uint16", "pictures are uint16: give uint8 of 0 to 255"),
        ("bool", "pictures are bool: give uint8"),
        ("last", r"pictures have the shape \(16, 16, 3\), where \(C, H, W\) belongs"),
        ("flat", r"pictures have the shape \(16, 16\)"),
    ],
)
def test_what_is_no_picture_is_refused(parts, kind, words):
    with pytest.raises(UserError, match=words):
        parts(kind)


@pytest.mark.parametrize(("kind", "values"), [("bytes", "0 to 25"), ("normal", "-2 to 2")])
def test_values_on_another_scale_are_said(parts, kind, values):
    (note,) = parts(kind).data.notes
    assert "where 0 to 1 is meant" in note
    assert values[-2:] in note
