"""Layers that stay as they are while the rest of a model trains."""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffkd.errors import UserError, nearest


def freeze(model: nn.Module, paths: Sequence[str], norms: bool, where: str) -> tuple[nn.Module, ...]:
    """Takes the gradients from layers, and gives those that belong in evaluation mode throughout.

    Args:
        model: to be trained.
        paths: of layers or of single weights.
        norms: whether batch normalisation is frozen all over the model.
        where: the recipe's section, for an error.

    Raises:
        UserError: there is nothing at a path.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    >>> freeze(net, ["0"], True, "student")
    (Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1)), BatchNorm2d(4, eps=1e-05, ...track_running_stats=True))
    >>> [name for name, p in net.named_parameters() if p.requires_grad]
    ['2.weight', '2.bias']
    """
    modules, weights = dict(model.named_modules()), dict(model.named_parameters())
    held = []
    for path in paths:
        if path in weights:
            weights[path].requires_grad_(False)
        elif path in modules and path:
            held.append(modules[path])
        else:
            raise UserError(f"{where}.freeze: no layer '{path}'{nearest(path, [*modules, *weights])}")
    if norms:
        held += [module for module in modules.values() if isinstance(module, _BatchNorm)]
    for module in held:
        module.requires_grad_(False)
    return tuple(held)
