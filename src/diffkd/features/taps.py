"""Reads features out of any module by layer path, channels first."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.errors import UserError, nearest

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


class Taps:
    """Features of a model, read by layer path while it runs, handed out channels first.

    A path may choose one entry of a list or dict that a layer gives (`fpn[0]`, `[out]`), and say the layout
    where the dry run cannot tell it (`stages.3@BHWC`). A layer that runs several times gives what it
    gave last. Hooks are registered at once, so make the taps before `torch.compile`.

    Args:
        model: any module.
        layers: paths as in `model.named_modules()`; "" is the model's output.

    Raises:
        UserError: a path or layout does not exist; the nearest ones are given.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Flatten())
    >>> taps = Taps(model, ["0", ""])
    >>> taps.probe(lambda: model(torch.rand(2, 3, 8, 8)), (8, 8))
    {'0': (8, 4, 4), '': (128,)}
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self._model = model
        self._requests = [_Request.parse(layer) for layer in layers]
        known = dict(model.named_modules())
        for request in self._requests:
            if request.path not in known:
                raise UserError(
                    f"no layer '{request.path}' in {type(model).__name__}{nearest(request.path, known)}"
                )
        self._store: dict[str, Any] = {}
        paths = dict.fromkeys(request.path for request in self._requests)
        self._handles = [known[path].register_forward_hook(_Keep(self._store, path)) for path in paths]
        self._layouts: dict[str, Layout] = {}
        self._entries: list[tuple[str, str, str | int | None]] = []
        self.without_gradient: tuple[str, ...] = ()

    def probe(self, run: Callable[[], Any], image_size: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
        """One dry run, from which each feature's layout is told.

        Args:
            run: runs the model on a sample.
            image_size: `(H, W)` of the pictures in the sample, where there are pictures.

        Returns:
            `(C, *S)` of each feature by its name; a layer that gives several gives as many names.

        Raises:
            UserError: a layer did not run, gives integers, or its layout cannot be told.
        """
        self._store.clear()
        with _watching(self._model) as leaves:
            run()
        self._entries, self._layouts = [], {}
        for request in self._requests:
            for name, key, feature in self._expand(request):
                if not feature.is_floating_point():
                    kind = str(feature.dtype)
                    raise UserError(
                        f"tap '{name}' gives integers ({kind}), which carry no gradient; "
                        "tap a floating-point layer"
                    )
                evidence = _Evidence(leaves.get(request.path, []), image_size, prefix_tokens(self._model))
                self._entries.append((name, request.path, key))
                self._layouts[name] = _tell_layout(name, feature, request.axes, evidence)
        raw = {name: _entry(self._store[path], key) for name, path, key in self._entries}
        self.without_gradient = tuple(name for name, feature in raw.items() if not feature.requires_grad)
        return {name: tuple(feature.shape[1:]) for name, feature in self.read().items()}

    def read(self) -> dict[str, Tensor]:
        """The features `(B, C, *S)` of the forward pass that just ran, by name; then forgets them.

        Raises:
            UserError: a tapped layer did not run.
        """
        features: dict[str, Tensor] = {}
        for name, path, key in self._entries:
            if path not in self._store:
                raise UserError(f"layer '{path}' did not run in this forward pass; tap another one")
            features[name] = self._layouts[name].apply(_entry(self._store[path], key))
        self._store.clear()
        return features

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _expand(self, request: "_Request") -> Iterator[tuple[str, str | int | None, Tensor]]:
        """The tensors that a request stands for: name, entry, tensor."""
        if request.path not in self._store:
            raise UserError(f"layer '{request.path}' did not run in a forward pass; tap another one")
        output = self._store[request.path]
        if isinstance(output, Tensor):
            if request.entry is not None:
                raise UserError(f"tap '{request.name}': the layer gives one tensor, without entries")
            yield request.name, None, output
            return
        entries = dict(_entries_of(output))
        chosen = [key for key in entries if request.entry in (None, str(key))]
        if not chosen:
            known = [str(key) for key in entries]
            word = request.entry or ""
            raise UserError(f"tap '{request.name}': the layer gives no such tensor{nearest(word, known)}")
        for key in chosen:
            yield (request.name if request.entry is not None else f"{request.path}[{key}]"), key, entries[key]


@dataclass(frozen=True)
class _Request:
    """A tap as the user wrote it: `path[entry]@LAYOUT`; its name is all but the layout."""

    name: str
    path: str
    entry: str | None
    axes: str | None

    @classmethod
    def parse(cls, text: str) -> "_Request":
        name, at, axes = text.partition("@")
        if at and axes not in LAYOUTS:
            raise UserError(f"tap '{text}': unknown layout '{axes}'{nearest(axes, LAYOUTS)}")
        match = re.fullmatch(r"(.*?)(?:\[([^\[\]]+)\])?", name)
        assert match is not None
        return cls(name, match[1], match[2], axes or None)


class _Keep:
    """A hook that keeps a layer's output. A class, so that deep copies of model and taps stay together."""

    def __init__(self, store: dict[str, Any], path: str) -> None:
        self.store, self.path = store, path

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.store[self.path] = output


def _entries_of(output: Any) -> Iterator[tuple[str | int, Tensor]]:
    pairs = output.items() if isinstance(output, Mapping) else enumerate(output) if _is_list(output) else ()
    yield from ((key, value) for key, value in pairs if isinstance(value, Tensor))


def _is_list(output: Any) -> bool:
    return isinstance(output, list | tuple)


def _entry(output: Any, key: str | int | None) -> Tensor:
    return output if key is None else output[key]  # type: ignore[no-any-return]


# --- telling the layout ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evidence:
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


def _tell_layout(name: str, feature: Tensor, axes: str | None, evidence: _Evidence) -> Layout:
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


def _is_channels_last(shape: tuple[int, ...], evidence: _Evidence) -> bool | None:
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


def _tokens(name: str, shape: tuple[int, ...], evidence: _Evidence, strict: bool = True) -> Layout:
    """Tokens as a map where they form the picture's grid, as a sequence elsewhere."""
    found = _find_grid(shape[1], evidence)
    if found is not None:
        return Layout("BNC", *found)
    if strict:
        raise UserError(
            f"tap '{name}': {shape[1]} tokens form no grid of the picture's proportions; use @BLC"
        )
    return Layout("BLC")


def _find_grid(count: int, evidence: _Evidence) -> tuple[int, tuple[int, int]] | None:
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


# --- dry runs --------------------------------------------------------------------------------------


@contextmanager
def dry_run(model: nn.Module) -> Iterator[None]:
    """Eval mode for a forward pass that leaves no trace: no statistics, no random numbers, no mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _watching(model: nn.Module) -> Iterator[dict[str, list[nn.Module]]]:
    """Layers with weights of their own, in order of execution, by every path that they are inside of."""
    inside: dict[str, list[nn.Module]] = {}
    handles = []

    def note(path: str) -> Callable[..., None]:
        parts = path.split(".") if path else []
        above = ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for outer in dict.fromkeys(above):
                inside.setdefault(outer, []).append(module)

        return hook

    latest: list[nn.Module] = []

    def remember(module: nn.Module, inputs: Any, output: Any) -> None:
        latest[:] = [module]

    def borrow(path: str) -> Callable[..., None]:
        # An activation or a permutation knows nothing of its axes: what ran before it does.
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            inside[path] = list(latest)

        return hook

    for path, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(note(path)))
            handles.append(module.register_forward_hook(remember))
        elif not any(True for _ in module.parameters()):
            handles.append(module.register_forward_hook(borrow(path)))
    try:
        yield inside
    finally:
        for handle in handles:
            handle.remove()


def positions(output: Any, image_size: tuple[int, ...] | None, prefix: int | None) -> int | None:
    """Number of places of a map or of a grid of tokens; None for anything else.

    Args:
        output: what a layer gave.
        image_size: `(H, W)` of the sample's pictures.
        prefix: class and register tokens in front, if known.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    shape = tuple(output.shape)
    if len(shape) == 4:
        last = _fits(shape[1:-1], image_size) and not _fits(shape[2:], image_size)
        if image_size is not None and not last and not _fits(shape[2:], image_size):
            return None
        return math.prod(shape[1:-1] if last else shape[2:])
    if len(shape) == 3:
        found = _find_grid(shape[1], _Evidence([], image_size, prefix))
        return None if found is None else math.prod(found[1])
    return None
