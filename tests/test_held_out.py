"""A part of the training data held out: which samples, how they are seen, and the test data left alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import box_files
import mask_cases
import picture_cases
from diffkd import Batch, Data
from diffkd.data.base import Loader, build
from diffkd.pictures.held import classes_in, part_of
from diffkd.pictures.memory import ArraySplit
from diffkd.runs.content import digests


class Own(Dataset):
    """Samples of one's own that say nothing of parts; a picture's value is its index."""

    def __init__(self, count, targets=None):
        self.count, self.targets = count, targets

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.full((1, 8, 8), index / 100) + torch.rand(()) / 1000, index % 2


class Forbidden(Dataset):
    """A test split that must not be touched."""

    def __len__(self):
        raise AssertionError("the test data was counted")

    def __getitem__(self, index):
        raise AssertionError("the test data was read")


def own(root=None):
    return Data(Own(20, [i % 2 for i in range(20)]), Forbidden(), 2, (1, 8, 8))


def rows(split, epoch=0):
    return next(Loader(split, len(split), shuffle=False).epoch(epoch))


def files(tmp_path, kind):
    """A small data set of files, with a test split, by the name of its task."""
    if kind == "folder":
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                for k in range(5):
                    place = tmp_path / split / name / f"{k}.png"
                    place.parent.mkdir(parents=True, exist_ok=True)
                    noise = np.random.default_rng(k).integers(0, 256, (80, 90, 3), np.uint8)
                    Image.fromarray(noise).save(place)
        return build("folder", str(tmp_path), {"image_size": 32}, val_fraction=0.2)
    if kind == "masks":
        return build("masks", str(mask_cases.street(tmp_path)), {"crop_size": 16}, val_fraction=0.34)
    box_files.coco(tmp_path, {"train": 6, "test": 2})
    return build("boxes", str(tmp_path), {"size": 64, "min_scale": 0.5}, val_fraction=0.34)


@pytest.mark.parametrize("kind", ["folder", "masks", "boxes"])
def test_files_held_out_are_seen_as_test_pictures_are(kind, tmp_path):
    data = files(tmp_path, kind)
    assert len(data.val) == 2
    assert type(data.val) is type(data.test)
    twice = [rows_of(data, data.val, epoch) for epoch in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True)), "augmented"
    again = [rows_of(data, data.train, epoch) for epoch in (0, 1)]
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(*again, strict=True))
    assert len(data.train) + len(data.val) == {"folder": 10}.get(kind, 6)
    assert any("held out for validation" in note for note in data.notes)


def rows_of(data, split, epoch):
    return list(next(Loader(split, len(split), shuffle=False, collate=data.collate).epoch(epoch)).images)


def test_arrays_are_held_out_of_every_class_without_their_augmentation():
    images = torch.arange(30, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    train = ArraySplit(images, torch.arange(30) % 3, crop_padding=2, flip=True, cutout=3)
    data = Data(train, train, 3, (1, 8, 8)).with_validation(0.2)
    val = rows(data.val)
    assert torch.equal(val.images, val.images[:, :, :1, :1].expand(-1, 1, 8, 8))
    assert val.targets.bincount().tolist() == [2, 2, 2]
    assert torch.equal(val.images[:, 0, 0, 0] % 3, val.targets)
    assert val.indices.tolist() == list(range(6))
    kept = data.train
    assert (kept.crop_padding, kept.flip, kept.cutout) == (2, True, 3)
    centre = {int(p[0, 6, 6]) for p in kept.images}
    assert centre.isdisjoint(val.images.flatten().tolist())
    assert len(centre) == 24


def test_scenes_with_boxes_keep_their_boxes():
    data = build("digit_scenes", None, {"kind": "detection", "train_scenes": 12, "test_scenes": 2})
    whole = rows(data.train)
    part = rows(part_of(data.train, np.array([3, 7]), training=False))
    assert torch.equal(part.images, whole.images[[3, 7]])
    for i, place in enumerate((3, 7)):
        assert torch.equal(part.targets[i]["boxes"], whole.targets[place]["boxes"])


class Doubled(ArraySplit):
    """A subclass that knows nothing of parts."""

    def batch(self, indices, seed):
        return super().batch(indices, seed)._replace(targets=self.extra[indices])


def test_a_subclass_that_says_no_parts_of_its_own_is_wrapped():
    split = Doubled(torch.zeros(10, 1, 4, 4), torch.arange(10) % 2)
    split.extra = torch.arange(10) * 2
    part = part_of(split, np.array([2, 9]), training=True)
    assert rows(part).targets.tolist() == [4, 18]
    assert rows(part).indices.tolist() == [0, 1]


def test_data_of_ones_own_are_wrapped_and_their_test_split_is_gone():
    data = build(f"{__name__}:own", None, {}, val_fraction=0.2, test_on="val")
    assert len(data.train) == 16
    assert rows(data.test).targets.bincount().tolist() == [2, 2]
    assert data.val is None
    assert any("seen as in training" in note for note in data.notes)
    again = build(f"{__name__}:own", None, {}, val_fraction=0.2, test_on="val")
    assert torch.equal(rows(again.test).images.round(decimals=2), rows(data.test).images.round(decimals=2))


def test_where_there_is_no_test_split_the_share_is_that(tmp_path):
    for name in ("cat", "dog"):
        for k in range(10):
            picture_cases.paint(tmp_path / name / f"{k}.png")
    data = build("folder", str(tmp_path), {}, val_fraction=0.3)
    assert (len(data.train), len(data.test), data.val) == (14, 6, None)
    held = build("folder", str(tmp_path), {}, val_fraction=0.3, test_on="val")
    assert (len(held.train), len(held.test)) == (10, 4)  # of the fourteen


def test_classes_are_found_where_they_are_listed():
    assert classes_in(Own(4)) is None
    assert classes_in(Own(3, [0, 1, 1])).tolist() == [0, 1, 1]
    assert classes_in(Own(2, [[0], [1, 2]])) is None
    part = part_of(Own(3, [0, 1, 2]), np.array([2, 0]), training=True)
    assert classes_in(part).tolist() == [2, 0]


def test_a_run_and_its_student_know_the_held_out_part(diffkd, tiny):
    status, _, said = diffkd(
        "train", tiny, "data.val_fraction=0.25", "data.test_on=val", "trainer.epochs=1", "output=run"
    )
    assert status == 0, said
    assert "359 of 1437 training samples held out for validation" in said
    status, out, said = diffkd("evaluate", "run")
    assert (status, said) == (0, "")
    assert "as recorded" in out
    status, _, said = diffkd("train", tiny, "data.val_fraction=1.0")
    assert (status, said.count("\n")) == (2, 1)
    assert "data.val_fraction: needs less than 1" in said


class Made:
    """Batches made as they are asked for."""

    def __init__(self, brightness):
        self.make = lambda count: torch.full((count, 1, 4, 4), brightness)

    def __len__(self):
        return 20

    def to(self, device):
        return self

    def batch(self, indices, seed):
        return Batch(self.make(len(indices)), indices % 2, indices)


def test_what_is_made_as_it_is_asked_for_counts_in_a_runs_identity_when_held_out_too():
    found = []
    for brightness in (0.1, 0.1, 0.2):
        data = Data(Made(brightness), Made(0.5), 2, (1, 4, 4)).with_validation(0.2).on_validation()
        found.append(digests(data, None)["test pictures"])
    assert found[0] == found[1] != found[2]
