"""Features that belong together: by name, by key, by stride, never by position."""

import warnings

import pytest
import torch
import torchvision
from torch import nn

from diffkd import Distiller, UserError
from diffkd.features.pairs import Probed, pair_up

TINY = {"weights": None, "weights_backbone": None, "num_classes": 3}


def side(tap, entries, seen=(64, 64), width=8):
    """What a tap gives whose entries have these strides, or these shapes."""
    shapes = {
        f"{tap}[{key}]": (width, *(s // stride for s in seen)) if isinstance(stride, int) else stride
        for key, stride in entries.items()
    }
    return Probed(shapes, seen)


def keys(ours, theirs, **options):
    pairs = pair_up({"a": "b"}, side("a", ours), side("b", theirs, **options), ())
    return [(p.student.layer[2:-1], p.teacher.layer[2:-1]) for p in pairs]


V = (8,)  # a vector


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({2: 2, 4: 4, 8: 8}, {4: 4, 8: 8, 16: 16}, [("4", "4"), ("8", "8")]),
        ({2: V, 4: V, 8: V}, {4: V, 8: V, 16: V}, [("4", "4"), ("8", "8")]),
        (
            {"0": 8, "1": 16, "p6": 64},
            {"0": 4, "1": 8, "2": 16, "pool": 64},
            [("0", "1"), ("1", "2"), ("p6", "pool")],
        ),
        ({"out": 1, "aux": 1}, {"aux": 1, "out": 1}, [("out", "out"), ("aux", "aux")]),
        ({"out": 1}, {"aux": 1, "out": 1}, [("out", "out")]),
        ({"low": 4, "high": 16}, {"high": 32, "low": 8}, [("low", "low"), ("high", "high")]),
        ({"fine": 4, "coarse": 16}, {"high": 16, "low": 4}, [("fine", "low"), ("coarse", "high")]),
        ({0: 4, 1: 8}, {0: 8, 1: 4}, [("0", "1"), ("1", "0")]),
        ({0: V, 1: V}, {0: V, 1: V}, [("0", "0"), ("1", "1")]),
        ({0: 16, 1: 16}, {0: 16, 1: 16}, [("0", "0"), ("1", "1")]),
        ({"p5": 32, "p6": 64, "p7": (8, 1, 1)}, {"p6": 64, "p5": 32}, [("p5", "p5"), ("p6", "p6")]),
    ],
)
def test_entries_find_their_counterpart(ours, theirs, expected):
    assert keys(ours, theirs) == expected


@pytest.mark.filterwarnings("ignore:.*left out")
def test_strides_are_those_of_the_picture_that_each_model_saw():
    found = keys({0: 8, 1: 16}, {0: 4, 1: 8, 2: 16}, seen=(800, 1344))
    assert found == [("0", "1"), ("1", "2")]


def test_what_is_left_out_is_said_once():
    with pytest.warns(
        UserWarning, match=r"student's p7 \(stride 64\), the teacher's p2 \(stride 4\)"
    ) as said:
        keys({"p3": 8, "p4": 16, "p7": 64}, {"p2": 4, "p3": 8, "p4": 16})
    assert len(said) == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (
            {0: 4, 1: 8},
            {0: 16, 1: 32},
            "student's maps have strides 4, 8, the teacher's 16, 32: none in common",
        ),
        (
            {0: 16, 1: 16},
            {0: 16, 1: 16, 2: 16},
            "of stride 16 the student has 2 (0, 1), the teacher 3 (0, 1, 2)",
        ),
        ({0: V, 1: V}, {0: V, 1: V, 2: V}, "gives 2 feature(s) (0, 1), the teacher's 'b' 3 (0, 1, 2)"),
        ({"a": V}, {"x": V, "y": V}, "no key or stride in common; name single ones, such as 'b[x]'"),
    ],
)
def test_nothing_in_common_is_refused_with_what_there_is(ours, theirs, words):
    with pytest.raises(UserError) as error:
        keys(ours, theirs)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_where_one_side_has_one_of_a_stride_it_is_the_others_deepest():
    with pytest.warns(UserWarning, match=r"left out: the student's 0 \(stride 32\)"):
        assert keys({0: 32, 1: 32, 2: 64}, {"p5": 32, "p6": 64}) == [("1", "p5"), ("2", "p6")]


def test_one_map_finds_its_level_of_a_pyramid():
    pyramid = side("b", {"0": 4, "1": 8, "2": 16})
    with pytest.warns(UserWarning, match="left out"):
        (pair,) = pair_up({"a": "b"}, Probed({"a": (8, 8, 8)}, (64, 64)), pyramid, ())
    assert (pair.student.layer, pair.teacher.layer) == ("a", "b[1]")


class Detector(nn.Module):
    """The features of a torchvision detector, which resizes and pads pictures itself."""

    def __init__(self, kind, size):
        super().__init__()
        self.detector = getattr(torchvision.models.detection, kind)(min_size=size, max_size=size, **TINY)

    def forward(self, images):
        found, _ = self.detector.transform(images)
        return self.detector.backbone(found.tensors)


def test_retinanet_and_faster_rcnn_pair_four_levels():
    torch.manual_seed(0)
    student = Detector("retinanet_resnet50_fpn", 128)
    teacher = Detector("fasterrcnn_mobilenet_v3_large_320_fpn", 128)
    teacher.detector.backbone = torchvision.models.detection.fasterrcnn_resnet50_fpn(**TINY).backbone
    images = [torch.rand(3, 60, 100), torch.rand(3, 50, 90)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        taps = {"detector.backbone": "detector.backbone"}
        distiller = Distiller(student, teacher, taps, "fitnet", images)
    found = [(p.student.layer[-5:], p.teacher.layer[-6:]) for p in distiller.pairs]
    assert [(a.split("[")[-1][:-1], b.split("[")[-1][:-1]) for a, b in found] == [
        ("0", "1"),
        ("1", "2"),
        ("2", "3"),
        ("p6", "pool"),
    ]
    assert all(p.student.shape == p.teacher.shape for p in distiller.pairs)
    left = [str(w.message) for w in said if "left out" in str(w.message)]
    assert len(left) == 1
    assert "student's p7" in left[0]
    assert "teacher's 0 (stride 4)" in left[0]
    assert bool(distiller(images).total.isfinite())
