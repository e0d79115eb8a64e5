"""Splits of a data set, and the loader that deals their samples out in a repeatable order."""

import pickle
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from diffkd import names  # noqa: F401  # finds a user's own files again in processes that read samples
from diffkd.batch import Batch, as_batch, to_device
from diffkd.errors import UserError, first_line, told
from diffkd.maths.randomness import generators_kept, mix, seed_sample
from diffkd.pictures.memory import evenly_labelled, together


@runtime_checkable
class BatchedSplit(Protocol):
    """Samples held whole in memory, gathered and augmented a batch at a time on their device."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> "BatchedSplit":
        """The same samples on a device."""
        ...

    def batch(self, indices: Tensor, seed: int) -> Batch:
        """The samples at `indices` (int64, on the CPU).

        What is random in a sample depends on `(seed, index)` alone, whatever else is in the batch:
        `diffkd.maths.randomness.Draws` gives such numbers.
        """
        ...


class Samples(Protocol):
    """A map-style data set: `samples[i]` is `(image, target)`, an image `(C, H, W)`.

    What is random in it is drawn from PyTorch's, Python's and NumPy's own generators, which the loader
    seeds for every sample. A sample that is None is left out of its batch, of which one has to be left.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@runtime_checkable
class Streamed(Protocol):
    """Samples that come one after the other, and none at random: of what does not fit the disks here.

    An epoch's order depends on its seed alone. Where a run goes on within an epoch, what it had is read
    again. Batches carry no `indices`: a sample has no place that lasts.
    """

    def __len__(self) -> int: ...

    def stream(self, seed: int | None, start: int = 0) -> Iterator[Any]:
        """What samples are made of, from one on, in an order that `seed` determines; None is their own."""
        ...

    def sample(self, row: Any) -> Any:
        """The sample of a row; what is random in it is drawn as for `Samples`."""
        ...


Split = BatchedSplit | Samples | Streamed


class Loader:
    """Deals a split out in batches. One seed gives one order, whatever the number of workers.

    Batch `k` of an epoch is the samples `k * batch_size` to `(k + 1) * batch_size` of the epoch's order,
    divided among the processes: the same samples on any number of them. The order depends on
    `(seed, epoch)`, a sample's augmentation on `(seed, epoch, index)` alone: it is the same for any
    batch size, number of workers and number of processes, and an epoch can be entered again at any
    batch. The process's own random generators are left as they were.

    Args:
        split: the samples.
        batch_size: samples per batch, all processes together.
        shuffle: a new order each epoch, and the last incomplete batch dropped (training). Else every
            sample comes once, on one of the processes; a process without a share of the last batch
            has one batch less.
        finish: what is done to a process's part of every batch last, with a generator (on the CPU) that
            depends on `(seed, epoch, batch)`: mixup, say.
        labelled: so many samples, the first of the split, carry labels: every batch has its share of them,
            and every process of the batch's; None does not tell them apart.
        rank, world_size: this process's share: every `world_size`-th sample of every batch. With `finish`,
            samples `i` and `B - 1 - i` of a batch stay on one process where the batch can be divided so:
            what mixup brings together is the same on any number of processes.
        workers: loader processes of map-style data sets; batched splits need none.
        say: is told what samples warn of (a picture that is skipped, say), whichever process reads them;
            None makes Python's own warnings of it.

    Raises:
        UserError: a batch to be shuffled is larger than the split, or cannot be divided equally.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        workers: int = 0,
        device: torch.device | None = None,
        collate: Callable[[list[Any]], Batch] | None = None,
        finish: Callable[[Batch, torch.Generator], Batch] | None = None,
        labelled: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if shuffle:
            _check_batch_size(batch_size, world_size, len(split))
        self.device = device or torch.device("cpu")
        self.split = split.to(self.device) if isinstance(split, BatchedSplit) else split
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.rank, self.world_size, self.finish, self.say = rank, world_size, finish, say or warnings.warn
        self.labelled = labelled
        self._plan = _Plan()
        self._workers: DataLoader[Any] | None = None
        if not isinstance(self.split, BatchedSplit):
            plan: Any = self._plan  # of more than lists of indices
            as_batches: Any = _Collate(collate)
            self._workers = DataLoader(
                _Seeded(self.split),
                batch_sampler=plan,
                num_workers=workers,
                collate_fn=as_batches,
                persistent_workers=workers > 0,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # else each epoch would draw from the run's own
            )

    def __len__(self) -> int:
        """Batches per epoch; of those of the last one, some processes may have no share."""
        count = len(self.split)
        return count // self.batch_size if self.shuffle else -(-count // self.batch_size)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[Batch]:
        """This process's part of the batches of epoch `number`, from batch `start` on, on the device."""
        for position, batch in enumerate(self._batches(number, start), start):
            if self.finish is not None:
                seed = mix(self.seed, number, position, 0, 1)
                batch = self.finish(batch, torch.Generator().manual_seed(seed))
            yield batch

    def close(self) -> None:
        """Ends its processes; the next epoch starts others.

        What a run that is over still holds would be copied into those of the next run, and complain there.
        """
        if self._workers is not None:
            self._workers._iterator = None

    def _batches(self, number: int, start: int) -> Iterator[Batch]:
        shares = self._shares(number, start)
        if isinstance(self.split, BatchedSplit):
            seed = mix(self.seed, number)
            yield from (self.split.batch(share, seed) for share in shares)
            return
        assert self._workers is not None
        streamed = isinstance(self.split, Streamed)
        plan = (_Share(self.seed, number, share.numpy()) for share in shares)
        self._plan.fill(self._streamed(number, start) if streamed else plan, len(self) - start)
        for batch, said in _started(self._workers):
            for line in said:
                self.say(line)
            if isinstance(batch, UserError):
                raise UserError(str(batch))  # a new one: the frame must not hold what holds the frame
            if batch is None and self.shuffle:  # a step that one process leaves out would hold up the others
                raise UserError(
                    "all samples of a training batch are None: leave such samples out of the data"
                )
            if batch is not None:
                yield to_device(batch._replace(indices=None) if streamed else batch, self.device)

    def _streamed(self, epoch: int, start: int) -> Iterator["_Share"]:
        """This process's rows, batch by batch; every process reads all, and decodes its own."""
        assert isinstance(self.split, Streamed)
        first, count = start * self.batch_size, len(self) * self.batch_size
        rows = self.split.stream(mix(self.seed, epoch) if self.shuffle else None, first)
        for place in range(first, min(count, len(self.split)), self.batch_size):
            batch = list(islice(rows, self.batch_size))[self.rank :: self.world_size]
            if batch:
                places = place + self.rank + self.world_size * np.arange(len(batch))
                yield _Share(self.seed, epoch, places, batch)

    def _shares(self, epoch: int, start: int) -> Iterator[Tensor]:
        """This process's sample indices, batch by batch in the order of the epoch."""
        order = torch.arange(len(self.split))
        if self.shuffle:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(mix(self.seed, epoch)))
            order = together(order, getattr(self.split, "groups", None), self.batch_size)
            if self.labelled is not None:
                order = evenly_labelled(order, self.labelled, self.batch_size)
        for batch in range(start, len(self)):
            samples = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            if len(share := samples[self._places(len(samples))]):
                yield share

    def _places(self, count: int) -> Tensor:
        """This process's places in a batch of so many samples."""
        places = torch.arange(count)
        if self.finish is not None and self.labelled is None and count % (2 * self.world_size) == 0:
            return places[torch.minimum(places, count - 1 - places) % self.world_size == self.rank]
        return places[self.rank :: self.world_size]


def _check_batch_size(batch_size: int, processes: int, count: int) -> None:
    least = batch_size // processes * processes
    if batch_size != least:
        fitting = " or ".join(str(size) for size in (least, least + processes) if 0 < size <= count)
        raise UserError(
            f"data.batch_size={batch_size} cannot be divided among {processes} processes; "
            + (f"{fitting} can" if fitting else "use fewer")
        )
    if batch_size > count:
        most = count // processes * processes
        raise UserError(
            f"data.batch_size={batch_size} is larger than the {count} training samples; "
            + (f"set it to {most} or less" if most else f"{processes} processes are too many for them")
        )


class _Share(NamedTuple):
    """One process's part of a batch."""

    seed: int
    epoch: int
    indices: np.ndarray
    rows: list[Any] | None = None


class _Plan:
    """The batches of the epoch under way, read by the DataLoader as its batch sampler."""

    def __init__(self) -> None:
        self.fill(iter(()), 0)

    def fill(self, shares: Iterator[_Share], count: int) -> None:
        self._shares, self._count = shares, count

    def __iter__(self) -> Iterator[_Share]:
        return self._shares

    def __len__(self) -> int:
        return self._count


def _started(workers: "DataLoader[Any]") -> Iterator[Any]:
    """A loader's batches; its processes run."""
    try:
        return iter(workers)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if not workers.num_workers:
            raise
        raise UserError(
            f"the data cannot be sent to the processes that read them ({first_line(error)}): define its "
            "classes and functions at the top of a file, or set data.workers=0"
        ) from error


class _Seeded(Dataset[Any]):
    """Makes a sample's random augmentation depend on its own seed alone."""

    def __init__(self, samples: Samples | Streamed) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, share: _Share) -> "_Read":
        """A batch's samples and their indices; at once, for generators are saved once a batch."""
        with generators_kept(), warnings.catch_warnings(record=True) as caught:
            rows = self._rows(share)
        return _Read(rows, [str(warning.message).partition("\n")[0] for warning in caught])

    def _rows(self, share: _Share) -> list[tuple[Any, int]] | UserError:
        rows = []
        for place, index in enumerate(share.indices.tolist()):
            seed_sample(mix(share.seed, share.epoch, index))
            try:
                rows.append((self._sample(share, place, index), index))
            except UserError as error:
                # as a value: raised in a loader process, it would come with a traceback for a message
                return error
            except Exception as error:  # of a data set of somebody's own
                return UserError(f"sample {index} of the data cannot be had: {told(error)}")
        return rows

    def _sample(self, share: _Share, place: int, index: int) -> Any:
        if share.rows is None:
            return self.samples[index]  # type: ignore[index]
        return self.samples.sample(share.rows[place])  # type: ignore[union-attr]


class _Read(NamedTuple):
    """Samples with their indices, or why there are none; and what reading them warned of."""

    rows: list[tuple[Any, int]] | UserError
    said: list[str]


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Batch] | None) -> None:
        self.collate = collate or default_collate

    def __call__(self, read: _Read) -> tuple[Batch | UserError | None, list[str]]:
        return self._batch(read.rows), read.said

    def _batch(self, rows: list[tuple[Any, int]] | UserError) -> Batch | UserError | None:
        if isinstance(rows, UserError):
            return rows
        rows = [row for row in rows if row[0] is not None]
        if not rows:
            return None
        samples = [sample for sample, _ in rows]
        try:
            batch = as_batch(self.collate(samples))
        except UserError as error:
            return error
        except Exception as error:
            return UserError(f"samples do not make a batch: {told(error)}{_hint(samples)}")
        return batch._replace(indices=torch.tensor([index for _, index in rows]))


def _hint(samples: list[Any]) -> str:
    """What is odd about samples that do not go together, where that is known."""
    pairs = [sample for sample in samples if isinstance(sample, tuple | list) and len(sample) == 2]
    if any(target is None for _, target in pairs):
        return "; a target is None: give the image alone where there is no label"
    shapes = {tuple(image.shape) for image, _ in pairs if isinstance(image, Tensor)}
    if len(shapes) > 1:
        two = " and ".join(map(str, sorted(shapes)[:2]))
        return f"; images differ in size, {two}: resize them, or give Data a collate"
    return ""
