"""The loader: who sees which sample when, and with which pixels."""

import multiprocessing
import pickle
import random
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from diffkd.data.base import Loader, builder
from diffkd.errors import UserError
from diffkd.maths.randomness import Draws
from diffkd.names import load_object
from diffkd.pictures.memory import ArraySplit, mix_batch
from picture_cases import build, tree


class Noisy:
    """Own data whose samples draw from every generator that transforms use."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        drawn = [torch.rand(()).item(), random.random(), np.random.rand(), index]
        return torch.tensor(drawn).view(1, 2, 2), index % 4


def of_files(folder):
    tree(folder, count=22)
    return build(folder, augment="randaugment", random_erasing=0.5).train


def of_rows(folder):
    datasets = pytest.importorskip("datasets")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    tree(folder / "photos" / "train", count=20)
    tree(folder / "photos" / "test", count=1)
    return builder("huggingface")(str(folder / "photos"), image_size=8, augment="trivial").train


def of_arrays(folder):
    images = torch.randint(256, (40, 3, 6, 6), dtype=torch.uint8)
    return ArraySplit(images, torch.arange(40) % 4, crop_padding=2, flip=True, cutout=2)


KINDS = [of_files, of_rows, of_arrays, lambda folder: Noisy()]


def flat(batches):
    """Batches as one list of tensors."""
    return [tensor for batch in batches for tensor in batch if isinstance(tensor, Tensor)]


def same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def generators():
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_goes_on_at_any_batch_and_the_run_s_own_generators_stay_untouched(tmp_path, kind):
    split = kind(tmp_path)
    before = generators()
    whole = list(Loader(split, 7, shuffle=True, seed=3).epoch(2))
    for start in range(len(whole)):
        entered = Loader(split, 7, shuffle=True, seed=3).epoch(2, start)
        assert same(flat(entered), flat(whole[start:]))
    assert generators() == before
    assert not same(flat(Loader(split, 7, shuffle=True, seed=3).epoch(3)), flat(whole))


@pytest.mark.parametrize("kind", KINDS[2:])
def test_an_epoch_left_halfway_can_be_entered_again(tmp_path, kind):
    loader = Loader(kind(tmp_path), 7, shuffle=True, workers=1)
    before = generators()
    first, second, *_ = whole = list(loader.epoch(1))
    left = loader.epoch(1)
    assert same(flat([next(left)]), flat([first]))
    assert same(flat([next(loader.epoch(1, 1))]), flat([second]))
    assert same(flat(loader.epoch(1)), flat(whole))
    assert generators() == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_of_a_sample_is_the_same_in_any_batch_on_any_number_of_workers_and_processes(tmp_path, kind):
    split = kind(tmp_path)

    def views(size, **where):
        batches = list(Loader(split, size, shuffle=True, seed=1, **where).epoch(4))
        return {i: image for b in batches for i, image in zip(b.indices.tolist(), b.images, strict=True)}

    expected = views(40)
    assert len(expected) == 40
    workers = (0,) if isinstance(split, ArraySplit) else (0, 1, 2)
    found = [views(size, workers=count) for size in (4, 8) for count in workers]
    parts = [views(8, rank=rank, world_size=2) for rank in range(2)]
    assert not set(parts[0]) & set(parts[1])
    for seen in (*found, parts[0] | parts[1]):
        assert seen.keys() == expected.keys()
        assert all(torch.equal(seen[i], expected[i]) for i in seen)


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_divide_the_same_batches(processes, start):
    def finish(batch, generator):
        return batch._replace(targets=torch.rand(1, generator=generator))

    def batches(finish=finish, **where):
        return list(Loader(Noisy(), 12, shuffle=True, finish=finish, **where).epoch(1, start))

    alone = batches()
    for position, batch in enumerate(alone):  # without partners to meet, sample i is process i's, and so on
        dealt = [batches(None, rank=r, world_size=processes)[position].indices for r in range(processes)]
        assert torch.equal(torch.stack(dealt, 1).flatten(), batch.indices)
    shares = [batches(rank=rank, world_size=processes) for rank in range(processes)]
    assert len(alone) == len(shares[0]) == 3 - start
    for position, batch in enumerate(alone):
        parts = [share[position] for share in shares]
        assert {len(part.indices) for part in parts} == {12 // processes}
        assert sorted(torch.cat([part.indices for part in parts])) == sorted(batch.indices)
        assert all(torch.equal(part.targets, batch.targets) for part in parts)  # drawn for all at once


@pytest.mark.parametrize(("processes", "size"), [(1, 16), (2, 16), (3, 39), (4, 2)])
def test_a_test_split_comes_whole_and_once(processes, size):
    loaders = [Loader(Noisy(), size, shuffle=False, rank=r, world_size=processes) for r in range(processes)]
    seen = [i for loader in loaders for batch in loader.epoch() for i in batch.indices.tolist()]
    assert sorted(seen) == list(range(40))


@pytest.mark.parametrize(
    ("size", "processes", "words"),
    [
        (41, 1, "=41 is larger than the 40 training samples; set it to 40 or less"),
        (42, 3, "=42 is larger than the 40 training samples; set it to 39 or less"),
        (9, 2, "=9 cannot be divided among 2 processes; 8 or 10 can"),
        (2, 3, "=2 cannot be divided among 3 processes; 3 can"),
        (40, 39, "=40 cannot be divided among 39 processes; 39 can"),
        (1, 41, "=1 cannot be divided among 41 processes; use fewer"),
        (50, 50, "50 processes are too many"),
    ],
)
def test_batches_that_do_not_fit_are_refused_with_those_that_do(size, processes, words):
    with pytest.raises(UserError, match=words):
        Loader(Noisy(), size, shuffle=True, world_size=processes)


def test_runs_of_one_command_read_their_data_once(tmp_path, monkeypatch):
    tree(tmp_path)
    from diffkd.data import base

    options = {"image_size": 8, "val_fraction": 0.25}
    with base.data_kept():
        first = base.build("folder", str(tmp_path), options)
        with base.data_kept():
            assert base.build("folder", str(tmp_path), dict(reversed(options.items()))) is first
        assert base.build("folder", str(tmp_path), options | {"flip": False}) is not first
    assert base.build("folder", str(tmp_path), options) is not first
    assert first.summary == "2 classes, 6 + 2 pictures"


def test_a_sample_that_is_none_is_left_out():
    class Holes(Noisy):
        def __getitem__(self, index):
            return None if index in (3, 8, 9, 10, 11) else super().__getitem__(index)

    batches = list(Loader(Holes(), 4, shuffle=False).epoch())
    assert [b.indices.tolist() for b in batches[:2]] == [[0, 1, 2], [4, 5, 6, 7]]
    assert batches[2].indices[0] == 12
    with pytest.raises(UserError, match="all samples of a training batch are None"):
        list(Loader(Holes(), 1, shuffle=True).epoch())


@pytest.mark.parametrize("workers", [0, 1])
def test_what_samples_warn_of_is_told_whichever_process_reads_them(workers):
    class Odd(Noisy):
        def __getitem__(self, index):
            if index in (1, 6):
                warnings.warn(f"sample {index} is odd\nvery", stacklevel=1)
            if index == 7:
                raise UserError("sample 7 is gone")
            return super().__getitem__(index)

    said = []
    with warnings.catch_warnings(record=True) as raw, pytest.raises(UserError, match="sample 7 is gone"):
        list(Loader(Odd(), 4, shuffle=False, workers=workers, say=said.append).epoch())
    assert raw == []
    assert said == ["sample 1 is odd", "sample 6 is odd"]


@pytest.mark.parametrize(("processes", "size"), [(2, 8), (3, 12), (2, 20)])
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("kind", [of_arrays, of_files])
def test_mixed_pictures_are_the_same_on_any_number_of_processes(tmp_path, kind, alphas, processes, size):
    split = kind(tmp_path)

    def mixed(**where):
        loader = Loader(
            split, size, shuffle=True, finish=lambda b, draw: mix_batch(b, 4, *alphas, draw), **where
        )
        batches = list(loader.epoch(1))
        rows = zip(*(torch.cat([b[part] for b in batches]) for part in range(3)), strict=True)
        return len(batches), {int(index): (image, target) for image, target, index in rows}

    count, whole = mixed()
    shares = [mixed(rank=rank, world_size=processes) for rank in range(processes)]
    assert {share[0] for share in shares} == {count}
    assert len({len(share[1]) for share in shares}) == 1
    together = {index: row for _, share in shares for index, row in share.items()}
    assert together.keys() == whole.keys()
    assert all(torch.equal(a, b) for i in whole for a, b in zip(whole[i], together[i], strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_sample_touches_the_device_s_generator():
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    list(Loader(Noisy(), 8, shuffle=True, device=torch.device("cuda")).epoch())
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_draws_are_uniform_independent_and_those_of_splitmix64():
    def splitmix(state):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ (state >> shift)) * factor % 2**64
        return state ^ (state >> 31)

    golden = 0x9E3779B97F4A7C15
    draws = Draws(2**63 - 5, torch.arange(20000))
    first, second = draws.integers(7), draws.uniform()
    start = splitmix((11 * golden + 2**63 - 5) % 2**64)
    assert first[11] == (splitmix((start + golden) % 2**64) >> 32) * 7 >> 32
    assert second[11] == (splitmix((start + 2 * golden) % 2**64) >> 40) / 2**24
    counts = torch.bincount(first, minlength=7).double()
    assert ((counts - 20000 / 7).square() / (20000 / 7)).sum() < 22.5  # chi-square, 6 degrees, p = 0.001
    assert abs(second.mean() - 0.5) < 0.01
    pairs = torch.stack([first.double(), second.double(), Draws(0, torch.arange(20000)).uniform().double()])
    assert torch.corrcoef(pairs).fill_diagonal_(0).abs().max() < 0.03
    assert abs(torch.corrcoef(torch.stack([second[1:], second[:-1]]))[0, 1]) < 0.03


def test_a_closed_loader_leaves_no_process_behind_and_goes_on():
    loader = Loader(Noisy(), 8, shuffle=True, workers=1)
    before = multiprocessing.active_children()
    first = [batch.images for batch in loader.epoch()]
    assert len(multiprocessing.active_children()) == len(before) + 1
    loader.close()
    assert multiprocessing.active_children() == before
    assert all(torch.equal(a, b.images) for a, b in zip(first, loader.epoch(), strict=True))
    loader.close()
    Loader(ArraySplit(torch.rand(4, 3, 8, 8), None), 2, shuffle=False).close()


def test_processes_started_anew_find_classes_of_ones_own_files(tmp_path, monkeypatch):
    (tmp_path / "my.data.py").write_text(
        "class Ones:\n    def __len__(self): return 4\n"
        "    def __getitem__(self, i): return torch.ones(1, 2, 2), 0\n"
        "import torch\nones = Ones()\n"
    )
    data = load_object(f"{tmp_path}/my.data.py:ones")
    sent = pickle.dumps(Loader(data, 2, shuffle=False)._workers.dataset)
    monkeypatch.delitem(sys.modules, type(data).__module__)  # as in a process that has not loaded it
    assert torch.equal(pickle.loads(sent).samples[0][0], torch.ones(1, 2, 2))


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_what_cannot_be_sent_to_processes_is_one_line():
    data = Noisy()
    data.change = lambda picture: picture
    loader = Loader(data, 20, shuffle=False, workers=1)
    loader._workers.multiprocessing_context = "spawn"
    with pytest.raises(UserError, match=r"cannot be sent to the processes .* or set data\.workers=0"):
        next(loader.epoch())
