"""Which layers are worth tapping where the user names none: the last of each resolution."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.features.layouts import positions, prefix_tokens
from diffkd.features.watch import dry_run

SAME_STAGE = 0.6  # convolutions without padding shrink a map a little: no new stage


@dataclass(frozen=True)
class _Layer:
    """A layer that ran and gave a map, or tokens that form one.

    Attributes:
        path: in its model.
        places: number of positions of its output.
        output: identity of the tensor that it gave.
        shrinks: by how much it reduces the number of positions of its input.
    """

    path: str
    places: int
    output: int
    shrinks: float


def find_stages(
    model: nn.Module, run: Callable[[], Any], image_size: tuple[int, ...] | None, count: int = 4
) -> list[str]:
    """Default taps: the last layer of each resolution, shallow to deep; the last is the last feature map.

    A model that tells its stages (timm's `feature_info`) is believed where these layers run and give
    maps; others are watched. A transformer of one resolution gives `count` of its blocks, evenly spaced.

    Args:
        model: any module.
        run: runs the model on a sample.
        image_size: `(H, W)` of the sample's pictures.
        count: blocks of a transformer.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.Flatten())
    >>> find_stages(model, lambda: model(torch.rand(2, 3, 16, 16)), (16, 16))
    ['1', '2']
    """
    ran = _watch(model, run, image_size)
    told = [ran[path] for path in _told(model) if path in ran]
    if len({layer.path for layer in told}) > 1:
        return _last_of_each(told, told, count)
    return _last_of_each(list(_units(model, ran)), list(ran.values()), count)


def _watch(model: nn.Module, run: Callable[[], Any], image_size: tuple[int, ...] | None) -> dict[str, _Layer]:
    """The layers that give maps, in the order in which they end."""
    ran: dict[str, _Layer] = {}
    kept: list[Tensor] = []  # alive until the end, so that identities stay unique
    prefix = prefix_tokens(model)

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            places = positions(output, image_size, prefix)
            if places is None:
                return
            before = positions(inputs[0], image_size, prefix) if inputs else None
            kept.append(output)
            ran.pop(path, None)  # a layer that runs again counts from then
            ran[path] = _Layer(path, places, id(output), (before or places) / places)

        return hook

    handles = [
        module.register_forward_hook(note(path))
        for path, module in model.named_modules()
        if path and not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        with dry_run(model), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return ran


# Not worth a tap: they pass a map on, or pool it to a size that the classifier wants.
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


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
        blocks = _blocks([layer.path for layer in seen if layer.places == kept[0].places])
        picks = [round((i + 1) * len(blocks) / count) - 1 for i in range(count)]
        chosen = [blocks[i] for i in sorted(set(picks)) if i >= 0]
        if chosen:
            return chosen
    return [_outermost(layer, seen) for layer in kept]


def _outermost(layer: _Layer, seen: list[_Layer]) -> str:
    """The shortest path that gives the same tensor: `layer1` says more than `layer1.2`."""
    same = [other.path for other in seen if other.output == layer.output]
    return min([layer.path, *same], key=lambda path: path.count("."))


def _blocks(paths: list[str]) -> list[str]:
    """The longest list of numbered siblings: a transformer's blocks."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        match = re.fullmatch(r"(.*?)\d+", path)
        if match is not None:
            groups.setdefault(match[1], []).append(path)
    best = max(groups.values(), key=len, default=[])
    return best if len(best) > 1 else []
