"""What a data set is, and the loader that deals its samples out in a repeatable order."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from diffkd.batch import Batch, as_batch
from diffkd.errors import UserError
from diffkd.maths.randomness import mix
from diffkd.names import is_path, load_object, load_submodule, options_of, submodules


@runtime_checkable
class BatchedSplit(Protocol):
    """Samples held whole in memory, gathered and augmented a batch at a time on their device."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> "BatchedSplit":
        """The same samples on a device."""
        ...

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        """The samples at `indices` (int64, on the CPU); all randomness is the generator's."""
        ...


class Samples(Protocol):
    """A map-style data set: `samples[i]` is `(image, target)`, an image `(C, H, W)`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


Split = BatchedSplit | Samples


@dataclass(frozen=True)
class Data:
    """A data set ready to train on.

    Attributes:
        train, test: the two splits; the train split augments, the test split does not.
        num_classes: None where the task has no classes.
        image_shape: `(C, H, W)` of an image, or of a typical one where sizes differ.
        mean, std: per channel, on the scale 0 to 1, of the training images.
        class_names: in the order of the class indices, or empty.
        collate: makes a Batch of a list of samples; None stacks images and targets.
        notes: what was decided for the user (a held-out share, a folder chosen), one line each.
    """

    train: Split
    test: Split
    num_classes: int | None
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    class_names: tuple[str, ...] = ()
    collate: Callable[[list[Any]], Batch] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()


def builder(name: str) -> Callable[..., Data]:
    """The function that makes a data set: `build(root, *, option=...) -> Data`.

    `name` is a file of this package (`digits`), one of its data sets (`torchvision/Food101` is
    `torchvision` with `dataset: Food101`), or `my_package.my_module:build`.

    Raises:
        UserError: nothing has that name; the nearest names are given.
    """
    if is_path(name):
        found = load_object(name)
        if not callable(found):
            raise UserError(f"data '{name}' is not a function")
        return found  # type: ignore[no-any-return]
    source, slash, dataset = name.partition("/")
    build = load_submodule("diffkd.data", source, "data set").build
    if not slash:
        return build  # type: ignore[no-any-return]
    if "dataset" not in options_of(build):
        raise UserError(f"data '{source}' is one data set: leave out '/{dataset}'")
    return partial(build, dataset=dataset)


def names() -> list[str]:
    """Names of the data sets at hand."""
    return submodules("diffkd.data")


class Loader:
    """Deals a split out in batches. One seed gives one order, whatever the number of workers.

    The order of an epoch and each sample's augmentation depend on `(seed, epoch)` alone, so that an
    epoch can be entered again at any batch and go on as if it had never stopped.

    Args:
        split: the samples.
        batch_size: samples per batch and process.
        shuffle: a new order each epoch, and the last incomplete batch dropped (training).
        finish: what is done to every batch last, with a generator (on the CPU) of its own: mixup, say.
        rank, world_size: this process's share: every `world_size`-th batch or sample.
        workers: loader processes of map-style data sets; batched splits need none.

    Raises:
        UserError: the batch of all processes together is larger than the split to be shuffled.
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
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if shuffle and batch_size * world_size > len(split):
            raise UserError(
                f"data.batch_size={batch_size} x {world_size} process(es) is larger than the "
                f"{len(split)} training samples; set data.batch_size to {len(split) // world_size} or less"
            )
        self.device = device or torch.device("cpu")
        self.split = split.to(self.device) if isinstance(split, BatchedSplit) else split
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.rank, self.world_size, self.finish = rank, world_size, finish
        self._plan = _Plan()
        self._workers: DataLoader[Any] | None = None
        if not isinstance(self.split, BatchedSplit):
            self._workers = DataLoader(
                _Seeded(self.split),
                batch_sampler=self._plan,
                num_workers=workers,
                collate_fn=_Collate(collate),
                persistent_workers=workers > 0,
                pin_memory=self.device.type == "cuda",
            )

    def __len__(self) -> int:
        """Batches per epoch."""
        share = len(self.split) // self.world_size if self.shuffle else len(self._share(0))
        return share // self.batch_size if self.shuffle else -(-share // self.batch_size)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number`, from batch `start` on, on the loader's device."""
        for position, batch in enumerate(self._batches(number, start), start):
            if self.finish is not None:
                seed = mix(self.seed, number, position, self.rank, 1)
                batch = self.finish(batch, torch.Generator().manual_seed(seed))
            yield batch

    def _batches(self, number: int, start: int) -> Iterator[Batch]:
        share = self._share(number)
        cuts = range(start * self.batch_size, len(self) * self.batch_size, self.batch_size)
        chunks = [share[cut : cut + self.batch_size] for cut in cuts]
        if isinstance(self.split, BatchedSplit):
            for position, chunk in enumerate(chunks, start):
                generator = torch.Generator(self.device)
                generator.manual_seed(mix(self.seed, number, position, self.rank))
                yield self.split.batch(chunk, generator)
            return
        assert self._workers is not None
        self._plan.chunks = [[(i, mix(self.seed, number, i)) for i in c.tolist()] for c in chunks]
        for batch in self._workers:
            if isinstance(batch, UserError):
                raise UserError(str(batch))  # a new one: the frame must not hold what holds the frame
            yield _to_device(batch, self.device)

    def _share(self, epoch: int) -> Tensor:
        """This process's sample indices in the order of the epoch."""
        order = torch.arange(len(self.split))
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            order = order[torch.randperm(len(order), generator=generator)]
            order = order[: len(order) // self.world_size * self.world_size]
        return order[self.rank :: self.world_size]


class _Plan:
    """The batches of the epoch under way, read by the DataLoader as its batch sampler."""

    def __init__(self) -> None:
        self.chunks: Sequence[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)


class _Seeded(Dataset[tuple[Any, int]]):
    """Makes a sample's random augmentation depend on its own seed alone."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        index, seed = key
        python, numpy = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed % 2**32)
                return self.samples[index], index
        except UserError as error:
            # as a value: raised in a loader process, it would come with a traceback for a message
            return error, index
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Batch] | None) -> None:
        self.collate = collate or default_collate

    def __call__(self, rows: list[tuple[Any, int]]) -> Batch | UserError:
        for sample, _ in rows:
            if isinstance(sample, UserError):
                return sample
        batch = as_batch(self.collate([sample for sample, _ in rows]))
        return batch._replace(indices=torch.tensor([index for _, index in rows]))


def _to_device(value: Any, device: torch.device) -> Any:
    """Tensors of a nested batch on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _to_device(v, device) for key, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to_device(v, device) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(_to_device(v, device) for v in value)
    return value
