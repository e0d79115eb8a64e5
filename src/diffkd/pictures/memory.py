"""Pictures held in memory: gathered, augmented and mixed a batch at a time on their device."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffkd.batch import UNLABELLED, Batch
from diffkd.errors import UserError
from diffkd.maths.randomness import Draws
from diffkd.pictures.decoding import decode


class ArraySplit:
    """Samples kept whole in memory; batches of them are cropped, flipped and cut out on the device.

    Nothing in `batch` waits for the device. The images are stored with their padding, so that
    gathering, cropping and flipping are one read.

    Args:
        images: `(N, C, H, W)`, uint8 (0 to 255) or floating point (0 to 1).
        targets: `(N,)` class indices; None where there are no labels.
        crop_padding: pixels of black added on every side before a random crop of the old size.
        flip: mirrors left and right, every second picture on average.
        cutout: side in pixels of a square set to `fill` around a random centre (arXiv 1708.04552).
        fill: colour of the cut-out square per channel, on the scale 0 to 1; black if not given.

    >>> split = ArraySplit(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.arange(5), crop_padding=1)
    >>> batch = split.batch(torch.tensor([4, 2]), seed=0)
    >>> tuple(batch.images.shape), batch.targets.tolist()
    ((2, 1, 8, 8), [4, 2])
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor | None,
        *,
        crop_padding: int = 0,
        flip: bool = False,
        cutout: int = 0,
        fill: Sequence[float] = (),
    ) -> None:
        self.size = images.shape[-2:]
        self.images = F.pad(images, (crop_padding,) * 4) if crop_padding else images
        self.targets = targets
        self.crop_padding, self.flip, self.cutout = crop_padding, flip, cutout
        scale = 1 if images.is_floating_point() else 255
        colour = torch.tensor(fill or (0.0,) * images.shape[1]) * scale
        self.fill = (colour if images.is_floating_point() else colour.round()).to(images.dtype).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "ArraySplit":
        """The same samples on a device."""
        moved = copy.copy(self)
        moved.images, moved.fill = self.images.to(device), self.fill.to(device)
        moved.targets = None if self.targets is None else self.targets.to(device)
        return moved

    def part(self, places: np.ndarray, *, training: bool) -> "ArraySplit":
        """The samples at some places `(n,)`, augmented as these are or not at all."""
        found, rows, edge = copy.copy(self), torch.from_numpy(places), self.crop_padding
        found.images = self.images[rows]
        found.targets = None if self.targets is None else self.targets[rows]
        if not training:
            height, width = self.size
            found.images = found.images[..., edge : edge + height, edge : edge + width].contiguous()
            found.crop_padding, found.flip, found.cutout = 0, False, 0
        return found

    def unlabelled(self, pictures: Sequence[tuple[str, Any]]) -> "ArraySplit":
        """Pictures without labels, of the size of these, augmented as these are.

        Args:
            pictures: what an error calls each, and its file.

        Raises:
            UserError: one cannot be read, or has another size.
        """
        grey, found = self.images.shape[1] == 1, []
        for name, place in pictures:
            picture = decode(place, name)
            if (picture.height, picture.width) != tuple(self.size):
                ours, theirs = (f"{h}x{w}" for h, w in (self.size, (picture.height, picture.width)))
                raise UserError(f"'{name}' is {theirs}, but the training pictures are {ours} in memory")
            values = np.array(picture.convert("L")) if grey else np.array(picture)
            found.append(torch.from_numpy(values).view(*self.size, -1).permute(2, 0, 1))
        images = torch.stack(found)
        images = images.to(self.images.dtype) / 255 if self.images.is_floating_point() else images
        split = copy.copy(self)
        split.images = F.pad(images, (self.crop_padding,) * 4) if self.crop_padding else images
        split.targets = torch.full((len(images),), UNLABELLED)
        return split

    def renumbered(self, places: np.ndarray) -> "ArraySplit":
        """The same with other class indices; `places` `(K,)` has the new one of each class."""
        split = copy.copy(self)
        if self.targets is not None:
            split.targets = torch.from_numpy(places)[self.targets.long()]
        return split

    def joined(self, other: "ArraySplit") -> "ArraySplit":
        """These samples, then the other's, which is augmented alike."""
        split = copy.copy(self)
        assert self.targets is not None
        assert other.targets is not None
        split.images = torch.cat([self.images, other.images])
        split.targets = torch.cat([self.targets, other.targets])
        return split

    def batch(self, indices: Tensor, seed: int) -> Batch:
        """The samples at `indices` `(B,)`; how each is augmented depends on `(seed, index)` alone."""
        indices = indices.to(self.images.device, non_blocking=True)
        draws = Draws(seed, indices)
        images = self._gather(indices, draws) if self.crop_padding or self.flip else self.images[indices]
        if self.cutout:
            images = cut_out(images, self.cutout, self.fill, draws)
        targets = None if self.targets is None else self.targets[indices]
        return Batch(images, targets, indices)

    def _gather(self, indices: Tensor, draws: Draws) -> Tensor:
        """Randomly cropped and flipped pictures `(B, C, H, W)`, read from the padded ones at once."""
        (height, width), device, count = self.size, self.images.device, len(indices)
        top, left = (draws.integers(2 * self.crop_padding + 1)[:, None] for _ in range(2))
        rows = top + torch.arange(height, device=device)
        columns = torch.arange(width, device=device).expand(count, width)
        if self.flip:
            mirrored = draws.uniform()[:, None] < 0.5
            columns = torch.where(mirrored, width - 1 - columns, columns)
        columns = columns + left
        channels = torch.arange(self.images.shape[1], device=device).view(-1, 1, 1)
        rows, columns = rows[:, None, :, None], columns[:, None, None, :]
        return self.images[indices.view(-1, 1, 1, 1), channels, rows, columns]


def cut_out(images: Tensor, side: int, fill: Tensor, draws: Draws) -> Tensor:
    """Pictures `(B, C, H, W)` with a square of `side` pixels each set to `fill`, broadcast to them.

    The square's centre is anywhere in the picture, so that it may reach over the border.
    """
    rows = _near_random_centre(images, 2, side, draws)
    columns = _near_random_centre(images, 3, side, draws)
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], fill, images)


def _near_random_centre(images: Tensor, axis: int, side: int, draws: Draws) -> Tensor:
    """`(B, length of the axis)`: which places lie within `side` places around a random one."""
    length = images.shape[axis]
    centre = draws.integers(length)[:, None]
    places = torch.arange(length, device=images.device) - centre + side // 2
    return (places >= 0) & (places < side)


def channel_statistics(images: Tensor, chunk: int = 1024) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of `(N, C, H, W)` pictures, on the scale 0 to 1.

    A channel without any contrast gets the standard deviation 1.

    >>> channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    ((0.5,), (0.5,))
    """
    total, squares = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk]
        values = part.double() if part.is_floating_point() else part.double() / 255
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total / count
    variance = (squares / count - mean**2).clamp_min(0)
    std = torch.where(variance > 1e-12, variance.sqrt(), torch.ones_like(variance))
    return tuple(mean.tolist()), tuple(std.tolist())


def some(count: int, number: int, labels: np.ndarray | None = None) -> np.ndarray:
    """Some of the places 0 to `count - 1`, the same at every call, in rising order; of every class alike.

    Args:
        count: how many samples there are.
        number: how many of them.
        labels: `(count,)` class of each sample; None draws regardless of class.

    >>> places = some(100, 10, np.arange(100) % 2)
    >>> len(places), int((places % 2).sum())
    (10, 5)
    """
    random = np.random.default_rng(0)
    groups = np.zeros(count, np.int64) if labels is None else np.asarray(labels)
    turn = np.empty(count)
    for group in np.unique(groups):
        members = random.permutation(np.flatnonzero(groups == group))
        turn[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(np.lexsort((random.permutation(count), turn))[:number])


def hold_out(count: int, fraction: float, labels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Places to train on and places to test on, the same at every call; both in rising order.

    Args:
        count: how many samples there are.
        fraction: share held out for the test, of every class where there are labels; every class
            of two or more samples gives at least one and keeps at least one.
        labels: `(count,)` class of each sample; None splits regardless of class.

    Raises:
        UserError: `fraction` is not between 0 and 1, or nothing would be left to train or test on.

    >>> train, test = hold_out(10, 0.2, np.array([0] * 5 + [1] * 5))
    >>> len(train), (test // 5).tolist()
    (8, [0, 1])
    """
    if not 0 < fraction < 1:
        raise UserError(f"data.val_fraction={fraction} must lie between 0 and 1")
    random = np.random.default_rng(0)
    groups = np.zeros(count, np.int64) if labels is None else np.asarray(labels)
    held = np.zeros(count, bool)
    for group in np.unique(groups):
        members = random.permutation(np.flatnonzero(groups == group))
        share = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[members[:share]] = True
    if not held.any():
        raise UserError(f"{count} samples are too few to hold some out; give a test split")
    return np.flatnonzero(~held), np.flatnonzero(held)


def together(order: Tensor, groups: np.ndarray | None, batch_size: int) -> Tensor:
    """An order of samples `(N,)` in which those of a group fill batches together.

    Every batch of one group stands where its last sample stood; what fills none comes at the end, mixed.

    Args:
        order: the samples, shuffled.
        groups: `(N,)`, the group of each sample by its index; None leaves the order as it is.
        batch_size: samples of a batch.

    >>> together(torch.tensor([0, 1, 2, 3, 4, 5]), np.array([0, 1, 0, 1, 1, 0]), 2).tolist()
    [0, 2, 1, 3, 4, 5]
    """
    if groups is None:
        return order
    waiting: dict[int, list[int]] = {}
    found: list[int] = []
    for index in order.tolist():
        batch = waiting.setdefault(int(groups[index]), [])
        batch.append(index)
        if len(batch) == batch_size:
            found += waiting.pop(int(groups[index]))
    rest = {index for batch in waiting.values() for index in batch}
    return torch.tensor(found + [index for index in order.tolist() if index in rest])


def evenly_labelled(order: Tensor, labelled: int, batch_size: int) -> Tensor:
    """An order of samples `(N,)` in which every batch has its share of labelled ones, which come first in it.

    Of processes that take every n-th sample of a batch, each has its share of them, too.

    Args:
        order: the samples, shuffled.
        labelled: the samples below this are labelled.
        batch_size: samples of a batch.

    >>> evenly_labelled(torch.tensor([3, 2, 0, 5, 1, 4]), 2, 3).tolist()
    [0, 3, 2, 1, 5, 4]
    """
    known, others = order[order < labelled], order[order >= labelled]
    turns = [(torch.arange(len(part)) + 0.5) / max(len(part), 1) for part in (known, others)]
    found = torch.cat([known, others])[torch.cat(turns).argsort(stable=True)]
    batch = torch.arange(len(found)) // batch_size
    return found[(2 * batch + (found >= labelled)).argsort(stable=True)]


def mix_batch(
    batch: Batch, num_classes: int, mixup_alpha: float, cutmix_alpha: float, generator: torch.Generator
) -> Batch:
    """Each picture mixed with another of the batch, by mixup (arXiv 1710.09412) or cutmix (1905.04899).

    One of the two is drawn per batch where both are on; sample `i` meets sample `B - 1 - i`.
    Nothing waits for the device.

    Args:
        batch: images `(B, C, H, W)`, targets `(B,)`, `(B, K)` or None.
        num_classes: K.
        mixup_alpha: parameter of the symmetric Beta distribution that the share is drawn from; 0 turns
            mixup off.
        cutmix_alpha: the same for cutmix.
        generator: on the CPU; the only source of randomness.

    Returns:
        Floating-point images `(B, C, H, W)` in 0 to 1 and targets `(B, K)`, or None as given.

    Raises:
        UserError: the pictures of the batch differ in size.

    >>> batch = Batch(torch.zeros(2, 3, 4, 4), torch.tensor([0, 2]))
    >>> mix_batch(batch, 3, 0.8, 0.0, torch.Generator()).targets.sum(1)
    tensor([1., 1.])
    """
    images = batch.images
    if isinstance(images, list):
        raise UserError("mixup and cutmix need pictures of one size")
    images = images if images.is_floating_point() else images.float() / 255
    targets = None if batch.targets is None else _as_probabilities(batch.targets, num_classes)
    seed = torch.randint(2**62, (1,), generator=generator).item()
    random = np.random.default_rng(int(seed))
    kinds = [kind for kind in ((mixup_alpha, _mixup), (cutmix_alpha, _cutmix)) if kind[0] > 0]
    if not kinds:
        return batch._replace(images=images, targets=targets)
    alpha, mix = kinds[random.integers(len(kinds))]
    images, share = mix(images, float(random.beta(alpha, alpha)), random)
    if targets is not None:
        targets = targets * share + targets.flip(0) * (1 - share)
    return batch._replace(images=images, targets=targets)


def _as_probabilities(targets: Tensor, num_classes: int) -> Tensor:
    if targets.is_floating_point() or targets.dim() == 2:
        return targets.float()
    # not F.one_hot, which reads the targets back where it checks their range
    blank = torch.zeros(len(targets), num_classes, device=targets.device)
    labels = targets.long()[:, None]
    known = (labels >= 0) & (labels < num_classes)  # a row of zeros else, which the task finds
    return blank.scatter_(1, labels.clamp(0, num_classes - 1), known.float())


def _mixup(images: Tensor, share: float, random: np.random.Generator) -> tuple[Tensor, float]:
    return images * share + images.flip(0) * (1 - share), share


def _cutmix(images: Tensor, share: float, random: np.random.Generator) -> tuple[Tensor, float]:
    """Pictures with a rectangle of about `1 - share` of the area from others, and the true share."""
    size = np.array(images.shape[-2:])
    half = np.sqrt(1 - share) * size / 2
    centre = random.random(2) * size
    (top, left), (bottom, right) = (
        np.clip(np.rint(centre + way * half), 0, size).astype(int).tolist() for way in (-1, 1)
    )
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / float(size.prod())
