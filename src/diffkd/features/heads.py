"""Where a model's head begins: the layers that turn features into answers."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from diffkd.features.outputs import entries_of

# Names of gradient nodes that no answer passes on its way out, but features do.
_ACTIVATIONS = ("Relu", "Gelu", "Silu", "Hardtanh", "Hardswish", "Elu", "Mish")


def head_of(model: nn.Module, output: Any, leaves: list[str]) -> list[str]:
    """Paths of the modules that a model's answers come from.

    An answer is computed by one last linear layer or convolution, as wide as the answer. Its head is what
    surrounds that layer up to where it parts from the first layer of all, unless that is most of the model.

    Args:
        model: whose parameters all required a gradient when it ran.
        output: what it gave, with its graph.
        leaves: paths of the layers with weights of their own, in order of execution.
    """
    if not leaves:
        return []
    owners = {
        id(parameter): (path, module)
        for path, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
    }
    heads = []
    for answer in _tensors(output):
        for parameter, active in _nearest_weights(answer):
            path, module = owners.get(id(parameter), ("", model))
            if _gives(module, answer, active):
                heads.append(_outermost(path, leaves))
    return list(dict.fromkeys(heads))


def inside(path: str, heads: list[str]) -> bool:
    """Whether a layer is one of some modules, or in one of them."""
    return any(path == head or path.startswith(f"{head}.") for head in heads)


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors of an output, however deep in lists and dicts."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
    else:
        yield from entries_of(output).values()


def _nearest_weights(answer: Tensor) -> Iterator[tuple[Any, bool]]:
    """The parameters of the last operations with weights, and whether an activation comes after them."""
    seen: set[Any] = set()
    waiting: list[tuple[Any, bool]] = [(answer.grad_fn, False)]
    while waiting:
        node, active = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        before = [n for n, _ in node.next_functions if n is not None]
        weights = [w for w in map(_parameter, before) if w is not None]
        if weights:
            yield from ((weight, active) for weight in weights)
            continue
        active = active or any(name in node.name() for name in _ACTIVATIONS)
        waiting += [(n, active) for n in before]


def _parameter(node: Any) -> Any:
    """The parameter that a gradient node belongs to, transposed perhaps."""
    if node.name() in ("TBackward0", "TransposeBackward0", "PermuteBackward0"):
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _gives(module: nn.Module, answer: Tensor, active: bool) -> bool:
    """Whether a layer is as wide as an answer; a convolution with an activation after it gives features."""
    if isinstance(module, nn.Linear):
        width = module.out_features
    elif isinstance(module, nn.modules.conv._ConvNd):
        width = module.out_channels
        if active and any(size != 1 for size in module.kernel_size):
            return False
    else:
        return False
    if answer.dim() < 2:
        return width == 1
    axes = {answer.shape[1]} | ({answer.shape[-1]} if answer.dim() == 3 else set())
    return any(width == axis or (axis > 1 and width % axis == 0) for axis in axes)


def _outermost(path: str, leaves: list[str]) -> str:
    """The largest module around a layer that holds neither the first layer nor most of all layers."""
    parts = path.split(".")
    counts: Counter[str] = Counter()
    for leaf in dict.fromkeys(leaves):
        steps = leaf.split(".")
        counts.update(".".join(steps[: i + 1]) for i in range(len(steps)))
    total = len(set(leaves))
    for i in range(len(parts)):
        around = ".".join(parts[: i + 1])
        if not inside(leaves[0], [around]) and 2 * counts[around] <= total:
            return around
    return path
