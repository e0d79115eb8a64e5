"""Signs that a teacher's class scores do not mean what they should."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffkd.tasks.base import near_chance

LEAST = 64  # labelled pictures, below which accuracy says nothing


def suspicions(scores: Tensor, labels: Tensor | None) -> Iterator[str]:
    """Warnings about a teacher, from its answers to some test pictures.

    Args:
        scores: its class scores `(B, K)`.
        labels: the classes `(B,)`; None where the pictures carry none.

    >>> labels = torch.arange(66) % 3
    >>> next(suspicions(torch.eye(3)[(labels + 1) % 3], labels))[:26]
    'the teacher is right on 0.'
    """
    classes = scores.shape[1]
    if labels is None or labels.dim() != 1 or labels.is_floating_point() or len(labels) < LEAST:
        return
    if 2 * len(set(labels.tolist())) < classes:  # a few of many classes
        return
    answers = scores.argmax(1)
    right = (answers == labels).float().mean().item()
    chance = _unrelated(answers, labels, classes)
    renamed = _best_order(answers, labels, classes)[answers]
    best, by_luck = (renamed == labels).float().mean().item(), _unrelated(renamed, labels, classes)
    if near_chance(right, chance, len(labels)):
        told = f"the teacher is right on {100 * right:.1f} % of {len(labels)} test pictures"
        yield f"{told}: chance is {100 * chance:.1f} %"
    elif best < right + 0.1:
        return
    # Some order always fits a few pictures better than chance: only a clear case is said.
    if len(labels) >= 5 * classes and best > by_luck + (1 - by_luck) / 2:
        yield (
            f"with its classes in another order it would be right on {100 * best:.1f} %, not on "
            f"{100 * right:.1f} %: its classes seem permuted; bring them in the order of the data's"
        )


def _unrelated(answers: Tensor, labels: Tensor, classes: int) -> float:
    """How often such answers would be right if they had nothing to do with the labels.

    That is one in K where classes are even, and nearly always where one class makes up nearly all.
    """
    shares = [x.bincount(minlength=classes).double() / len(x) for x in (answers, labels)]
    return float(shares[0] @ shares[1])


def _best_order(answers: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The one-to-one renaming of the classes `(K,)` under which the answers are right most often."""
    from scipy.optimize import linear_sum_assignment

    counts = torch.zeros(classes, classes, dtype=torch.int64, device=answers.device)
    counts.index_put_((answers, labels), torch.ones_like(answers), accumulate=True)
    return torch.from_numpy(linear_sum_assignment(-counts.cpu().numpy())[1]).to(answers.device)
