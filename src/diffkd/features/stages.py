"""Which layers are worth tapping where the user names none: the last of each resolution."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.features.heads import head_of, inside
from diffkd.features.layouts import Evidence, positions, prefix_tokens
from diffkd.features.outputs import entries_of
from diffkd.features.watch import Watched, all_learning, dry_run, watching

SAME_STAGE = 0.6  # convolutions without padding shrink a map a little: no new stage


@dataclass(frozen=True)
class _Layer:
    """A layer that ran and gave a map, or tokens that form one.

    Attributes:
        path: in its model.
        places: number of positions of its output.
        output: identity of the tensor that it gave.
        shrinks: by how much it reduces the number of positions of its input.
        plain: it gave the tensor itself, and not a list that begins with it.
    """

    path: str
    places: int
    output: int
    shrinks: float
    plain: bool = True


def find_stages(
    model: nn.Module, run: Callable[[], Any], image_size: tuple[int, ...] | None, count: int = 4
) -> list[str]:
    """Default taps: the last layer of each resolution, shallow to deep; the last is the last feature map.

    The search stops in front of heads: layers that the model's answers come from, and those that run over
    maps of several sizes. What the latter look at, a pyramid, is then the one tap. A model that tells its
    stages (timm's `feature_info`) is believed where these layers run and give maps; others are watched. A
    transformer of one resolution gives `count` of its blocks, evenly spaced.

    Args:
        model: any module.
        run: runs the model on a sample.
        image_size: `(H, W)` of the sample's pictures.
        count: blocks of a transformer.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.Flatten())
    >>> find_stages(model, lambda: model(torch.rand(2, 3, 16, 16)), (16, 16))
    ['1', '2']
    """
    seen = _watch(model, run, image_size)
    if seen.pyramid is not None:
        return [seen.pyramid]
    told = [seen.ran[path] for path in _told(model) if path in seen.ran]
    if len({layer.path for layer in told}) > 1:
        return _last_of_each(told, told, count)
    return _last_of_each(list(_units(model, seen.ran)), list(seen.ran.values()), count)


@dataclass(frozen=True)
class _Seen:
    """What a dry run showed: the layers in front of heads that give maps, in the order in which they end.

    Attributes:
        pyramid: the layer that gives the maps that a head shared by several sizes looks at.
    """

    ran: dict[str, _Layer]
    pyramid: str | None


class _Log:
    """Hooks that note what every layer is given and gives."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self.ended: list[tuple[str, Any, Any]] = []  # alive until the end, so that identities stay unique
        self.sizes: dict[str, set[tuple[int, ...]]] = {}
        self.head_inputs: list[Tensor] = []
        self.head_begins: int | None = None
        self._first: dict[str, tuple[int, Tensor]] = {}

    def enter(self, path: str) -> Callable[..., None]:
        """A hook for a layer with weights of its own: one that sees maps of several sizes is a head."""

        def hook(module: nn.Module, inputs: Any) -> None:
            given = inputs[0] if inputs else None
            if not isinstance(given, Tensor) or given.dim() != 4:
                return
            begun, _ = self._first.setdefault(path, (len(self.ended), given))
            sizes = self.sizes.setdefault(path, set())
            sizes.add(tuple(given.shape[2:]))
            if len(sizes) > 1 and (self.head_begins is None or begun < self.head_begins):
                self.head_begins = begun

        return hook

    def leave(self, path: str) -> Callable[..., None]:
        """A hook for any layer."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.ended.append((path, inputs[0] if inputs else None, output))

        return hook

    def shared(self) -> Tensor | None:
        """The first map that the first head over several sizes was given."""
        heads = [self._first[path] for path, sizes in self.sizes.items() if len(sizes) > 1]
        return min(heads, key=lambda head: head[0])[1] if heads else None


def _watch(model: nn.Module, run: Callable[[], Any], image_size: tuple[int, ...] | None) -> _Seen:
    """Runs the model once and tells its layers in front of heads."""
    handles = []
    with dry_run(model), all_learning(model), watching(model) as watched:
        log = _Log(watched)
        for path, module in model.named_modules():
            if path and not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_hook(log.leave(path)))
                if any(True for _ in module.parameters(recurse=False)):
                    handles.append(module.register_forward_pre_hook(log.enter(path)))
        try:
            output = run()
        finally:
            for handle in handles:
                handle.remove()
    heads = head_of(model, output, watched.paths)
    ended = log.ended if log.head_begins is None else log.ended[: log.head_begins]
    size = watched.seen or image_size
    ran: dict[str, _Layer] = {}
    for path, given, gave in ended:
        if inside(path, heads):
            continue
        evidence = Evidence(watched.leaves.get(path, []), size, prefix_tokens(model))
        main = _main(gave)
        places = positions(main, evidence) if main is not None else None
        if main is None or places is None or watched.batch not in (None, main.shape[0]):
            continue
        before = positions(given, evidence)
        ran.pop(path, None)  # a layer that runs again counts from then
        ran[path] = _Layer(path, places, id(main), (before or places) / places, main is gave)
    return _Seen(ran, _pyramid(log, ended))


def _main(output: Any) -> Tensor | None:
    """A layer's output, the first of several."""
    if isinstance(output, Tensor):
        return output
    first = output[0] if isinstance(output, tuple) and output else None
    return first if isinstance(first, Tensor) else None


def _pyramid(log: _Log, ended: list[tuple[str, Any, Any]]) -> str | None:
    """The outermost layer that gives several maps, of which a shared head looks at one."""
    looked = log.shared()
    if looked is None:
        return None
    found = [
        path
        for path, _, output in ended
        if not isinstance(output, Tensor)
        and len(entries_of(output)) > 1
        and any(tensor is looked for tensor in entries_of(output).values())
    ]
    return min(found, key=lambda path: path.count("."), default=None)


# Not worth a tap: they pass a map on, or pool it to a size that the classifier wants.
_PASSING = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.Flatten,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


def _told(model: nn.Module) -> list[str]:
    """The layers that the model itself calls its features."""
    info = getattr(model, "feature_info", None)
    rows = getattr(info, "info", info)
    if not isinstance(rows, list):
        return []
    return [row["module"] for row in rows if isinstance(row, Mapping) and "module" in row]


def _units(model: nn.Module, ran: Mapping[str, _Layer], path: str = "") -> Iterator[_Layer]:
    """Layers that end at a place of the model's main path, in the order of the run.

    What is inside of a residual block, or of any other module that shrinks its map at most once, is
    its own affair: a block that ends at half the size begins at the full one, and that layer is no stage.
    """
    found = []
    for name, child in model.named_children():
        place = f"{path}.{name}" if path else name
        layer = ran.get(place)
        transparent = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        if layer is None or transparent or layer.shrinks > 4.5:
            found += list(_units(child, ran, place))
        if layer is not None and not isinstance(child, _PASSING):
            found.append(layer)
    order = {name: i for i, name in enumerate(ran)}
    yield from sorted(found, key=lambda layer: order[layer.path])


def _last_of_each(units: list[_Layer], seen: list[_Layer], count: int) -> list[str]:
    """Of the layers in order of execution, the last one of each size, sizes falling."""
    falling: list[_Layer] = []
    for layer in units:
        while falling and falling[-1].places * SAME_STAGE < layer.places:
            falling.pop()
        falling.append(layer)
    # A pooled 1x1 map is no stage, unless there is nothing else.
    kept = [layer for layer in falling if layer.places > 1] or falling
    if len(kept) == 1:
        blocks = _blocks([layer for layer in seen if layer.places == kept[0].places])
        picks = [round((i + 1) * len(blocks) / count) - 1 for i in range(count)]
        chosen = [_outermost(blocks[i], seen) for i in sorted(set(picks)) if i >= 0]
        if chosen:
            return chosen
    return [_outermost(layer, seen) for layer in kept]


def _outermost(layer: _Layer, seen: list[_Layer]) -> str:
    """The shortest path that gives the same tensor: `layer1` says more than `layer1.2`."""
    same = [layer, *(other for other in seen if other.output == layer.output)]
    best = min(same, key=lambda other: (not other.plain, other.path.count(".")))
    return best.path if best.plain else f"{best.path}[0]"


def _blocks(layers: list[_Layer]) -> list[_Layer]:
    """The outermost list of numbered siblings, the longest of those: a transformer's blocks."""
    groups: dict[str, list[_Layer]] = {}
    for layer in layers:
        match = re.fullmatch(r"(.*?)\d+", layer.path)
        if match is not None:
            groups.setdefault(match[1], []).append(layer)
    several = {stem: group for stem, group in groups.items() if len(group) > 1}
    best = min(several, key=lambda stem: (stem.count("."), -len(several[stem])), default=None)
    return several[best] if best is not None else []
