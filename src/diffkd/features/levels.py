"""Several levels of features distilled together: at a lower resolution, and with a weight each."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from diffkd.errors import UserError, nearest
from diffkd.features.maps import shrink, valid_at
from diffkd.features.pairs import Pair


def pooled(feature: Tensor, valid: Tensor | None, factor: int) -> Tensor:
    """A feature `(B, C, *S)` averaged over so many positions along each axis, valid ones alone.

    Args:
        feature: vectors `(B, C)` stay as they are.
        valid: `(B, *S)` bool of any size, None for all valid.
        factor: positions along an axis.

    >>> import torch
    >>> pooled(torch.ones(2, 3, 9, 8), None, 2).shape
    torch.Size([2, 3, 5, 4])
    """
    if factor == 1 or feature.dim() < 3:
        return feature
    size = tuple(-(-side // factor) for side in feature.shape[2:])
    return shrink(feature, valid_at(valid, feature), size)


def check_weights(weights: Mapping[str, float], pairs: Sequence[Pair], method: str) -> dict[str, float]:
    """The weights of single pairs by name.

    Raises:
        UserError: there is no pair of that name, or a weight is negative.
    """
    names = [pair.name for pair in pairs]
    for name, weight in weights.items():
        if name not in names:
            raise UserError(f"method '{method}': weights names no pair '{name}'{nearest(name, names)}")
        if weight < 0:
            raise UserError(f"method '{method}': the weight of '{name}' is {weight}, less than 0")
    return dict(weights)
