"""Made scenes: the truth about them fits their pixels, and one seed makes them once."""

import pytest
import torch

from diffkd import UserError
from diffkd.data.digit_scenes import build
from diffkd.pictures.scenes import SceneOptions, compose

STOCK = torch.ones(2, 8, 8)
PLAIN = {"clutter": 0, "noise": 0.0, "rotation": 0.0}


def scenes(count=6, seed=0, **options):
    return compose(STOCK, torch.tensor([3, 7]), count, seed, SceneOptions(**PLAIN | options))


def test_a_box_holds_just_its_digits_pixels():
    found = scenes(20)
    for mask, box, label in zip(found.masks, found.boxes[:, 0], found.labels[:, 0], strict=True):
        rows, columns = torch.where(mask == label + 1)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box.tolist() == [float(edge) for edge in expected]


def test_a_digit_stands_out_from_its_ground():
    found = scenes(20, contrast=0.5)
    for image, mask in zip(found.images.float() / 255, found.masks, strict=True):
        assert (image[:, mask > 0].mean() - image[:, mask == 0].mean()).abs() > 0.3


def test_hidden_digits_are_not_asked_for():
    found = scenes(200, digits=(4, 4), scale=(0.6, 0.7))
    hidden = found.labels < 0
    assert 0.05 < hidden.float().mean() < 0.9
    assert (found.boxes[hidden] == 0).all()
    for mask, labels in zip(found.masks, found.labels, strict=True):
        assert set(mask.unique().tolist()) - {0} <= {int(x) + 1 for x in labels if x >= 0}


def test_one_seed_makes_one_set_of_scenes():
    one, same, other = scenes(seed=5), scenes(seed=5), scenes(seed=6)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.images, other.images)


def test_the_targets_of_each_kind():
    small = {"size": 32, "train_scenes": 8, "test_scenes": 4}
    first = torch.arange(4)
    targets = {
        kind: build(kind=kind, **small).test.batch(first, seed=0).targets
        for kind in ("classification", "segmentation", "detection")
    }
    assert targets["classification"].shape == (4,)
    assert targets["segmentation"].shape == (4, 32, 32)
    for target in targets["detection"]:
        assert target["boxes"].shape == (len(target["labels"]), 4)
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"root": "somewhere"}, "leave out data.root='somewhere'"),
        ({"train_scenes": 0}, "data.train_scenes=0: needs at least 1"),
        ({"size": 8}, "size=8: needs at least 16"),
    ],
)
def test_impossible_scenes(options, said):
    with pytest.raises(UserError, match=said):
        build(**options)
