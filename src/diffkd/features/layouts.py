"""Which axis of a layer's output is which, told from the layers, the picture and the shape."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffkd.errors import UserError

# What the axes of a layer's output are: B batch, C channels, L positions, N tokens of a picture, D H W space.
LAYOUTS = ("BC", "BCL", "BLC", "BNC", "BCHW", "BHWC", "BCDHW", "BDHWC")
MAX_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class Layout:
    """How one feature is brought to `(B, C, *S)`.

    Attributes:
        axes: one of LAYOUTS.
        prefix: class and register tokens in front, which are dropped.
        grid: height and width of the tokens' grid in the dry run.
    """

    axes: str
    prefix: int = 0
    grid: tuple[int, int] = (0, 0)

    def apply(self, feature: Tensor) -> Tensor:
        """The feature, channels first, tokens as a map."""
        if self.axes == "BNC":
            tokens = feature[:, self.prefix :].transpose(1, 2)
            height, width = self._grid(tokens.shape[2])
            return tokens.reshape(*tokens.shape[:2], height, width)
        return feature.movedim(-1, 1) if self.axes in ("BLC", "BHWC", "BDHWC") else feature

    def _grid(self, count: int) -> tuple[int, int]:
        """Height and width of so many tokens, of the dry run's proportions."""
        height, width = self.grid
        if height * width == count:
            return self.grid
        height = round(math.sqrt(count * height / width))
        return height, count // height


@dataclass(frozen=True)
class Evidence:
    """What speaks for a layout.

    Attributes:
        leaves: the layers with weights inside the tapped one, in the order in which they ran.
        image_size: of the sample's pictures.
        prefix: class and register tokens, if the model says how many it has.
    """

    leaves: list[nn.Module]
    image_size: tuple[int, ...] | None
    prefix: int | None

    def channels_last(self, shape: tuple[int, ...]) -> bool | None:
        """What the last layer with weights says of the channel axis; None where it says nothing."""
        for leaf in reversed(self.leaves):
            if isinstance(leaf, nn.LayerNorm) or type(leaf).__name__ in ("LayerNorm", "RMSNorm"):
                return _width(leaf) == shape[-1] if _width(leaf) in (shape[-1], shape[1]) else None
            if isinstance(leaf, nn.RNNBase):
                return True if leaf.batch_first else None
            if isinstance(leaf, nn.Linear) and leaf.out_features == shape[-1]:
                return True
            width = _channels_first_width(leaf)
            if width in (shape[1], shape[-1]):
                return width != shape[1]
        return None


def _width(leaf: nn.Module) -> int:
    weight = getattr(leaf, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) else -1


def _channels_first_width(leaf: nn.Module) -> int | None:
    if isinstance(leaf, nn.modules.batchnorm._NormBase | nn.GroupNorm):
        return leaf.num_features if hasattr(leaf, "num_features") else leaf.num_channels  # type: ignore[return-value]
    if isinstance(leaf, nn.modules.conv._ConvNd):
        return leaf.out_channels
    return None


def tell_layout(name: str, feature: Tensor, axes: str | None, evidence: Evidence) -> Layout:
    """The layout of the feature that tap `name` gave; `axes` is what the user says it is, if anything.

    Raises:
        UserError: the user's layout does not fit, or the layout cannot be told.
    """
    shape = tuple(feature.shape)
    if axes is not None:
        if len(axes) != len(shape):
            raise UserError(f"tap '{name}' is {shape}, which layout {axes} does not fit")
        return _tokens(name, shape, evidence) if axes == "BNC" else Layout(axes)
    if len(shape) == 2:
        return Layout("BC")
    if len(shape) not in (3, 4, 5):
        raise UserError(f"tap '{name}' is {shape}: a feature has a batch, a channel and 0 to 3 spatial axes")
    first, last = {3: ("BCL", "BLC"), 4: ("BCHW", "BHWC"), 5: ("BCDHW", "BDHWC")}[len(shape)]
    is_last = _is_channels_last(shape, evidence)
    if is_last is None:
        raise UserError(
            f"tap '{name}' is {shape}, and which axis holds the channels cannot be told; write "
            f"'{name}@{first}' or '{name}@{last}'"
        )
    if is_last and len(shape) == 3:
        return _tokens(name, shape, evidence, strict=False)
    return Layout(last if is_last else first)


def _is_channels_last(shape: tuple[int, ...], evidence: Evidence) -> bool | None:
    """The layers' own word and the picture's proportions; None where they are silent or disagree."""
    word = evidence.channels_last(shape)
    fits_first, fits_last = _fits(shape[2:], evidence.image_size), _fits(shape[1:-1], evidence.image_size)
    if len(shape) == 4 and fits_first != fits_last and (word is None or word == fits_last):
        return fits_last
    if len(shape) == 3 and word is None and evidence.image_size is not None:
        grid_last = _find_grid(shape[1], evidence) is not None
        grid_first = _find_grid(shape[2], evidence) is not None
        return grid_last if grid_first != grid_last else None
    if len(shape) == 4 and fits_first != fits_last:
        return None
    return word


def _fits(spatial: tuple[int, ...], image_size: tuple[int, ...] | None) -> bool:
    """Whether axes are a picture's height and width, both shrunk alike."""
    if image_size is None or len(spatial) != 2 or len(image_size) != 2:
        return False
    strides = [max(1, round(full / small)) for full, small in zip(image_size, spatial, strict=True)]
    shrunk = all(small <= full for small, full in zip(spatial, image_size, strict=True))
    likely = set(strides)
    near = max(likely) <= min(likely) + max(1, min(likely) // 4)
    return shrunk and near


def _tokens(name: str, shape: tuple[int, ...], evidence: Evidence, strict: bool = True) -> Layout:
    """Tokens as a map where they form the picture's grid, as a sequence elsewhere."""
    found = _find_grid(shape[1], evidence)
    if found is not None:
        return Layout("BNC", *found)
    if strict:
        raise UserError(
            f"tap '{name}': {shape[1]} tokens form no grid of the picture's proportions; use @BLC"
        )
    return Layout("BLC")


def _find_grid(count: int, evidence: Evidence) -> tuple[int, tuple[int, int]] | None:
    """Class and register tokens in front, and the grid that the others form."""
    if evidence.image_size is None or len(evidence.image_size) != 2:
        return None
    height, width = evidence.image_size
    candidates = range(MAX_PREFIX_TOKENS + 1) if evidence.prefix is None else sorted({evidence.prefix, 0})
    found = []
    for prefix in candidates:
        rest = count - prefix
        if rest < 4:
            continue
        rows = math.sqrt(rest * height / width)
        for h in {math.floor(rows), math.ceil(rows)}:
            if h and rest % h == 0 and _fits((h, rest // h), evidence.image_size):
                found.append((prefix, (h, rest // h)))
    # Of several, a grid of just the picture's proportions, then the one with the fewest tokens in front.
    return min(found, key=lambda f: (f[1][0] * width != f[1][1] * height, f[0]), default=None)


def prefix_tokens(model: nn.Module) -> int | None:
    """Class and register tokens that a model says it puts in front of the picture's."""
    prefix = getattr(model, "num_prefix_tokens", None)
    return prefix if isinstance(prefix, int) else None


def positions(output: Any, evidence: Evidence) -> int | None:
    """Number of places of a map, a volume, a sequence or a grid of tokens; None for anything else."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    shape, size = tuple(output.shape), evidence.image_size
    if len(shape) == 3 and size is not None and len(size) == 2:
        found = _find_grid(shape[1], evidence)
        return None if found is None else math.prod(found[1])
    if len(shape) == 4 and (size is None or len(size) == 2):
        last = _fits(shape[1:-1], size) and not _fits(shape[2:], size)
        if size is not None and not last and not _fits(shape[2:], size):
            return None
        return math.prod(shape[1:-1] if last else shape[2:])
    if len(shape) in (3, 5):
        word = evidence.channels_last(shape)
        return None if word is None else math.prod(shape[1:-1] if word else shape[2:])
    return None
