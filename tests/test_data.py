"""Data sets held in memory: digits, arrays, CIFAR, and what is done to their batches."""

import gzip
import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffkd.batch import Batch
from diffkd.data.base import BatchedSplit, Loader, builder
from diffkd.errors import UserError
from diffkd.maths.randomness import Draws
from diffkd.names import options_of
from diffkd.pictures.memory import ArraySplit, channel_statistics, cut_out, hold_out, mix_batch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count, height=6, width=5, channels=3):
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator())


# the split in memory


def test_digits_are_one_fixed_stratified_split():
    data, again = builder("digits")(None), builder("digits")(None, shift=0)
    assert (len(data.train), len(data.test), data.num_classes, data.image_shape) == (1437, 360, 10, (1, 8, 8))
    assert torch.equal(data.test.images, again.test.images)
    assert data.test.images.max() == 255
    counts = torch.bincount(data.test.targets)
    assert counts.min() >= 34
    assert counts.max() <= 37
    plain = again.train.images.double() / 255
    assert np.allclose([data.mean[0], data.std[0]], [plain.mean(), plain.std(correction=0)])


@pytest.mark.parametrize(
    ("root", "shift", "word"), [("data", 1, "data.root='data'"), (None, -1, "data.shift=-1")]
)
def test_digits_refuse_what_makes_no_sense(root, shift, word):
    with pytest.raises(UserError, match=word):
        builder("digits")(root, shift=shift)


def test_batches_are_the_samples_themselves_without_augmentation():
    images, targets = pictures(7), torch.arange(7)
    split = ArraySplit(images, targets)
    assert isinstance(split, BatchedSplit)
    batch = split.batch(torch.tensor([6, 0]), 0)
    assert torch.equal(batch.images, images[[6, 0]])
    assert batch.targets.tolist() == batch.indices.tolist() == [6, 0]
    assert ArraySplit(images, None).batch(torch.tensor([1]), 0).targets is None


@pytest.mark.parametrize("flip", [False, True])
def test_each_crop_is_one_of_the_possible_ones_and_all_of_them_occur(flip):
    images, pad = pictures(1, 4, 3), 1
    padded = F.pad(images, (pad,) * 4)[0]
    views = [padded[:, y : y + 4, x : x + 3] for y in range(3) for x in range(3)]
    views += [view.flip(-1) for view in views] if flip else []
    split = ArraySplit(images, None, crop_padding=pad, flip=flip)
    batch = torch.cat([split.batch(torch.tensor([0]), seed).images for seed in range(400)])
    matches = torch.stack([(batch == view).flatten(1).all(1) for view in views], 1)
    assert matches.sum(1).eq(1).all()
    assert matches.sum(0).gt(0).all()


def test_augmentation_differs_between_the_samples_and_repeats_with_the_seed():
    split = ArraySplit(pictures(64), None, crop_padding=2, flip=True, cutout=2)
    places = torch.arange(64)
    first, second = (split.batch(places, 3).images for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, split.batch(places, 4).images)


def test_cutout_paints_squares_of_the_right_size_around_any_centre():
    images = torch.full((500, 1, 6, 6), 9, dtype=torch.uint8)
    holes = cut_out(images, 3, torch.zeros(1, 1, 1, dtype=torch.uint8), Draws(0, torch.arange(500))) == 0
    areas = holes.flatten(1).sum(1)
    assert set(areas.tolist()) == {4, 6, 9}  # in a corner, at a border, inside
    rows, columns = holes[:, 0].any(2).sum(1), holes[:, 0].any(1).sum(1)
    assert torch.equal(rows * columns, areas)


def test_cutout_is_filled_with_the_colour_given():
    split = ArraySplit(torch.zeros(4, 3, 4, 4, dtype=torch.uint8), None, cutout=8, fill=(1.0, 0.5, 0.0))
    images = split.batch(torch.arange(4), 0).images
    assert images.dtype == torch.uint8
    assert images.amax((0, 2, 3)).tolist() == [255, 128, 0]


def test_statistics_are_those_of_the_whole_and_a_flat_channel_keeps_its_scale():
    images = pictures(10)
    images[:, 2] = 51
    mean, std = channel_statistics(images, chunk=3)
    plain = images.double() / 255
    assert np.allclose(mean, plain.mean((0, 2, 3)))
    assert np.allclose(std[:2], plain.std((0, 2, 3), correction=0)[:2])
    assert std[2] == 1


def test_holding_out_is_stratified_repeatable_and_leaves_every_class_a_sample():
    labels = np.repeat([0, 1, 2], [50, 10, 1])
    train, test = hold_out(61, 0.1, labels)
    assert sorted([*train, *test]) == list(range(61))
    assert np.bincount(labels[test]).tolist() == [5, 1]
    assert all(np.array_equal(a, b) for a, b in zip((train, test), hold_out(61, 0.1, labels), strict=True))
    for count, fraction in ((1, 0.1), (10, 0.0), (10, 1.0)):
        with pytest.raises(UserError):
            hold_out(count, fraction)


# mixing


def test_mixup_blends_pictures_and_targets_by_the_same_share():
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    mixed = mix_batch(Batch(images, torch.tensor([0, 1])), 2, 1.0, 0.0, generator())
    share = mixed.targets[1, 1]
    assert 0 < share < 1
    assert torch.allclose(mixed.images[1], share)
    assert torch.allclose(mixed.images[0], 1 - share)
    assert torch.allclose(
        mixed.targets, torch.stack([torch.stack([share, 1 - share]), torch.stack([1 - share, share])])
    )


def test_cutmix_shares_are_the_areas_of_one_rectangle():
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    for seed in range(20):
        mixed = mix_batch(Batch(images, torch.tensor([0, 2])), 3, 0.0, 1.0, generator(seed))
        hole = mixed.images[0, 0]
        assert torch.isclose(hole.mean(), mixed.targets[0, 2])
        assert hole.any(1).sum() * hole.any(0).sum() == hole.sum()
        assert torch.equal(mixed.images[1], 1 - mixed.images[0])


def test_mixing_draws_either_kind_and_takes_uint8_soft_and_missing_targets():
    images = pictures(2)
    batches = [mix_batch(Batch(images), 3, 1.0, 1.0, generator(seed)) for seed in range(12)]
    assert all(batch.images.is_floating_point() and batch.targets is None for batch in batches)
    plain = images / 255
    pasted = [bool(((b.images == plain) | (b.images == plain.flip(0))).all()) for b in batches]
    assert {True, False} == set(pasted)
    soft = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert torch.equal(mix_batch(Batch(images, soft), 3, 0.0, 0.0, generator()).targets, soft)
    with pytest.raises(UserError, match="one size"):
        mix_batch(Batch([images[0]]), 3, 1.0, 0.0, generator())


# arrays


def write_npz(folder, count=12, size=6, classes=3, **changes):
    for split in ("train", "test"):
        x = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        np.savez(folder / f"{split}.npz", **({"x": x, "y": np.arange(count) % classes} | changes))


def test_archives_are_read_as_they_are(tmp_path):
    write_npz(tmp_path)
    data = builder("arrays")(str(tmp_path), crop_padding=0, flip=False)
    x = torch.from_numpy(np.load(tmp_path / "train.npz")["x"])
    batch = data.train.batch(torch.arange(12), 0)
    assert torch.equal(batch.images, x.permute(0, 3, 1, 2))
    assert (data.num_classes, data.image_shape, data.notes) == (
        3,
        (3, 6, 6),
        ("12 of 12 test pictures are training pictures too",),
    )
    assert np.allclose(data.mean, (x / 255).mean((0, 1, 2)))
    assert builder("arrays")(str(tmp_path), num_classes=7).num_classes == 7


def test_separate_grey_float_arrays_with_a_held_out_share(tmp_path):
    x = np.random.default_rng(0).random((20, 4, 5))
    np.save(tmp_path / "x_train.npy", x)
    np.save(tmp_path / "y_train.npy", np.arange(20, dtype=np.uint8) % 2)
    data = builder("arrays")(str(tmp_path), val_fraction=0.2)
    assert (len(data.train), len(data.test), data.image_shape) == (16, 4, (1, 4, 5))
    assert data.test.targets.tolist().count(1) == 2
    assert "4 of 20" in data.notes[0]
    images = data.train.batch(torch.arange(16), 0).images
    assert images.dtype == torch.float32
    assert images.max() <= 1


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_the_files_of_mnist(tmp_path, ending):
    def idx(name, array):
        shape = np.array(array.shape, ">i4").tobytes()
        content = bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes()
        (tmp_path / (name + ending)).write_bytes(gzip.compress(content) if ending else content)

    x = np.arange(3 * 4 * 4).reshape(3, 4, 4)
    for split in ("train", "t10k"):
        idx(f"{split}-images-idx3-ubyte", x)
        idx(f"{split}-labels-idx1-ubyte", np.array([0, 9, 4]))
    data = builder("arrays")(str(tmp_path))
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(x).to(torch.uint8))
    assert data.test.targets.tolist() == [0, 9, 4]
    assert data.num_classes == 10


def test_unlabelled_arrays_train_without_targets_and_test_with_those_there_are(tmp_path):
    write_npz(tmp_path)
    data = builder("arrays")(str(tmp_path), labels="none")
    assert data.train.batch(torch.arange(2), 0).targets is None
    assert data.test.batch(torch.arange(2), 0).targets.tolist() == [0, 1]
    (tmp_path / "test.npz").unlink()
    with pytest.raises(UserError, match=r"data\.num_classes=K"):
        builder("arrays")(str(tmp_path), labels="none")
    assert builder("arrays")(str(tmp_path), labels="none", num_classes=5).test.targets is None


PICTURES = np.zeros((12, 6, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": np.zeros((12, 6), np.uint8)}, r"train\.npz.*\(12, 6\)"),
        ({"x": np.zeros((0, 6, 6, 3), np.uint8)}, r"train\.npz.*\(0, 6, 6, 3\)"),
        ({"x": np.zeros((12, 3, 6, 6), np.uint8)}, r"train\.npz.*looks like \(N, C, H, W\)"),
        ({"x": PICTURES.astype(np.int32)}, r"train\.npz.*int32"),
        ({"x": np.full((12, 6, 6), np.nan)}, r"train\.npz.*NaN"),
        ({"x": np.full((12, 6, 6), 255.0)}, r"train\.npz.*255"),
        ({"y": np.zeros(11, int)}, r"train\.npz.*\(11,\).*\(12,\)"),
        ({"y": np.full(12, 0.5)}, r"train\.npz.*float64"),
        ({"y": np.arange(12) - 1}, r"train\.npz.*label -1"),
        ({"y": np.array([None] * 12)}, r"cannot read.*train\.npz"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, changes, words):
    write_npz(tmp_path, **changes)
    with pytest.raises(UserError, match=words) as caught:
        builder("arrays")(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_labels_beyond_the_number_of_classes_are_named(tmp_path):
    write_npz(tmp_path)
    np.savez(tmp_path / "test.npz", x=PICTURES, y=np.full(12, 8))
    with pytest.raises(UserError, match=r"test\.npz.*label 8, outside 0 to 4"):
        builder("arrays")(str(tmp_path), num_classes=5)


def test_missing_and_damaged_files_are_named(tmp_path):
    def message(name="arrays", root=tmp_path, **options):
        with pytest.raises(UserError) as caught:
            builder(name)(None if root is None else str(root), **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "readme.txt").touch()
    assert "data.root=FOLDER" in message(root=None)
    assert "does not exist" in message(root=tmp_path / "nowhere")
    assert "is a file" in message(root=tmp_path / "readme.txt")
    assert "no train.npz" in message()
    assert "readme.txt" in message()
    np.savez(tmp_path / "train.npz", pixels=PICTURES)
    assert "no x in" in message()
    np.savez(tmp_path / "train.npz", x=PICTURES)
    assert "no y in" in message()
    for content in (b"", b"PK broken", (tmp_path / "train.npz").read_bytes()[:300]):
        (tmp_path / "train.npz").write_bytes(content)
        assert "cannot read" in message()
        assert "train.npz" in message()
    (tmp_path / "train.npz").unlink()
    np.save(tmp_path / "x_train.npy", PICTURES)
    assert "there is no" in message()
    assert "y_train.npy" in message()
    write_npz(tmp_path)
    np.savez(tmp_path / "test.npz", x=np.zeros((2, 6, 7, 3), np.uint8), y=[0, 1])
    assert "(3, 6, 7)" in message()
    assert "data.cutout=-1" in message(cutout=-1)


def test_a_pickle_in_an_array_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    (tmp_path / "x_train.npy").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="x_train"):
        builder("arrays")(str(tmp_path))
    assert not (tmp_path / "sprung").exists()


# CIFAR


def test_cifar_reads_archives_and_pads_crops_and_flips(tmp_path):
    write_npz(tmp_path, size=32, classes=10)
    data = builder("cifar10")(str(tmp_path))
    assert (data.num_classes, data.image_shape, data.train.crop_padding, data.train.flip) == (
        10,
        (3, 32, 32),
        4,
        True,
    )
    assert builder("cifar100")(str(tmp_path)).num_classes == 100
    assert np.allclose(builder("cifar100")(str(tmp_path), cutout=16).mean, [0.507, 0.487, 0.441], atol=1e-3)


def test_cifar_reads_the_official_version(tmp_path, monkeypatch):
    from torchvision import datasets

    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    batch = {"data": np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8), "labels": [3, 9]}
    for name, _ in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list):
        (folder / name).write_bytes(pickle.dumps(batch))
    names = [f"kind {i}" for i in range(10)]
    (folder / datasets.CIFAR10.meta["filename"]).write_bytes(pickle.dumps({"label_names": names}))
    with pytest.raises(UserError, match="no intact cifar-10-batches-py"):
        builder("cifar10")(str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = builder("cifar10")(str(tmp_path))
    assert (len(data.train), len(data.test), data.class_names) == (10, 2, tuple(names))
    assert torch.equal(data.test.images[0].flatten(), torch.arange(3072).to(torch.uint8))
    assert data.test.targets.tolist() == [3, 9]


def test_what_is_not_cifar_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.download=true"):
        builder("cifar100")(str(tmp_path))
    write_npz(tmp_path, size=28)
    with pytest.raises(UserError, match=r"train\.npz.*\(3, 28, 28\)"):
        builder("cifar10")(str(tmp_path))
    write_npz(tmp_path, size=32, classes=12)
    with pytest.raises(UserError, match=r"label 11, outside 0 to 9"):
        builder("cifar10")(str(tmp_path))


# what all have in common


def test_spread_options_are_keywords_of_their_own_and_unknown_ones_are_refused():
    options = options_of(builder("arrays"))
    assert list(options)[-3:] == ["crop_padding", "flip", "cutout"]
    assert options["crop_padding"].annotation is int
    assert options["flip"].default is True
    assert "options" not in options
    assert "ArrayOptions" in inspect.getdoc(builder("arrays"))
    with pytest.raises(TypeError, match="colour"):
        builder("digits")(None, colour=1)
    with pytest.raises(TypeError, match="colour"):
        builder("arrays")(None, colour=1)


def test_one_seed_gives_one_epoch(tmp_path):
    write_npz(tmp_path)
    data = builder("arrays")(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = [[b.images for b in Loader(data.train, 4, shuffle=True, seed=1).epoch(2)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_made_on_the_device_without_waiting_for_it():
    split = ArraySplit(pictures(50), torch.arange(50), crop_padding=2, flip=True, cutout=2)
    device = torch.device("cuda")
    moved = split.to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = moved.batch(torch.arange(20), 0)
        mixed = mix_batch(batch, 50, 0.8, 1.0, generator())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batch.images.device.type == mixed.targets.device.type == "cuda"
