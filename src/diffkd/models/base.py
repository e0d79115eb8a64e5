"""From a model's name to a module, and the pictures as that module wants them."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.errors import UserError, nearest, told
from diffkd.names import check_kind, is_path, load_object, load_submodule, submodules

PART_WEIGHTS = ("encoder_weights", "backbone_weights")  # options that name a file, or published weights


@dataclass(frozen=True)
class Wants:
    """What a model needs to see, where it does not take pictures as they come.

    Attributes:
        size: pixels of the side of its pictures; None takes any size.
        mean, std: per channel, on the scale 0 to 1, that its published weights were made with.
        channels: of its pictures; None takes any number.
    """

    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None


def build(
    name: str,
    *,
    num_classes: int | None,
    image_shape: tuple[int, int, int],
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A model with fresh weights.

    Args:
        name: `source/model` where a file of this package is the source, or `my_module:function`
            (called with those of `num_classes`, `in_channels` and `image_size` that it takes).
        num_classes: size of the model's head; None where the task has no classes.
        image_shape: `(C, H, W)` of the pictures it will see.
        options: further arguments of the model.

    Raises:
        UserError: no such source or model; the nearest names are given; or an option is not taken.
    """
    known: dict[str, Any] = {"in_channels": image_shape[0], "image_size": image_shape[1:]}
    if num_classes is not None:
        known["num_classes"] = num_classes
    options = dict(options or {})
    if is_path(name):
        return _build_outside(name, known, options)
    source, model = _source(name)
    if options and not _open_ended(source.build):
        _check_options(name, source.build, options, hidden="name")
    return source.build(model, **{**known, **options})  # type: ignore[no-any-return]


def without_start(options: Mapping[str, Any]) -> dict[str, Any]:
    """A model's options but for those that say which weights a part of it starts from.

    What they name need not be there where all the weights are loaded afterwards.

    >>> without_start({"encoder_weights": "a.pth", "decoder_channels": 64})
    {'decoder_channels': 64}
    """
    return {key: value for key, value in options.items() if key not in PART_WEIGHTS}


def wants(name: str, weights: str | None) -> Wants:
    """What a model needs to see.

    Args:
        name: as for `build`.
        weights: name of published weights; None for fresh or local ones.
    """
    if is_path(name):
        return Wants()
    source, model = _source(name)
    found = getattr(source, "wants", None)
    return Wants() if found is None else found(model, weights)


def published_state(name: str, weights: str) -> dict[str, Tensor]:
    """Published weights of a model by their name, fetched by the source's own library.

    Raises:
        UserError: there are none of that name, or they cannot be fetched.
    """
    fetch = None if is_path(name) else getattr(_source(name)[0], "state", None)
    if fetch is None:
        raise UserError(f"no weights file '{weights}', and '{name}' has no published weights")
    return fetch(_source(name)[1], weights)  # type: ignore[no-any-return]


def tell_normalisation(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Lets a model that normalises pictures itself, as torchvision's detectors do, do it as it is trained."""
    own = getattr(model, "transform", None)
    if hasattr(own, "image_mean") and hasattr(own, "image_std"):
        own.image_mean, own.image_std = list(mean), list(std)  # type: ignore[union-attr]


def _source(name: str) -> tuple[ModuleType, str]:
    source, slash, model = name.partition("/")
    if not slash:
        raise UserError(
            f"model '{name}' has no source; write one of "
            + ", ".join(f"'{s}/{name}'" for s in submodules("diffkd.models"))
            + " or 'my_module:function'"
        )
    return load_submodule("diffkd.models", source, "model source"), model


def _build_outside(name: str, known: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    function = load_object(name)
    check_kind(name, function, "a function that builds a model, or a torch.nn.Module", (nn.Module,))
    if isinstance(function, nn.Module):  # a model that is there already
        return copy.deepcopy(function)
    takes = inspect.signature(function).parameters
    if not _open_ended(function):
        _check_options(name, function, options)
        known = {k: v for k, v in known.items() if k in takes}
    try:
        model = function(**{**known, **options})
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model '{name}' cannot be built: {told(error)}; student.options or teacher.options add arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model '{name}' returned {type(model).__name__}, not a torch.nn.Module")
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner  # trainer.compile compiles what is run, which a wrapper around the layers hides
    if isinstance(model, nn.DataParallel):
        model = model.module
    try:
        model.train(model.training)
    except (AttributeError, NotImplementedError):  # frozen TorchScript, an exported program
        return Modeless(model)
    return model  # type: ignore[no-any-return]


class Modeless(nn.Module):
    """A program that knows no training mode, which every other module does, and shows no weights or layers.

    Args:
        inner: frozen TorchScript, say.
    """

    inner: Any

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.__dict__["inner"] = inner  # not as a part: whoever sets modes would meet it

    def _apply(self, fn: Any, recurse: bool = True) -> "Modeless":
        self.inner._apply(fn)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the program gives."""
        return self.inner(*args, **kwargs)


def _open_ended(function: Any) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _check_options(name: str, function: Any, options: Mapping[str, Any], hidden: str = "") -> None:
    takes = [n for n in inspect.signature(function).parameters if n != hidden]
    for option in options:
        if option not in takes:
            raise UserError(f"model '{name}' takes no option '{option}'{nearest(option, takes)}")


class Classifier(nn.Module):
    """Stages, the mean over all positions, a linear head.

    Args:
        stages: the first is named `stem`, the others `stage1` and so on.
        channels: of the last stage's output.
        num_classes: size of the logits `(B, num_classes)`.
    """

    def __init__(self, stages: Sequence[nn.Module], channels: int, num_classes: int) -> None:
        super().__init__()
        self._names = ["stem", *(f"stage{i}" for i in range(1, len(stages)))]
        for name, stage in zip(self._names, stages, strict=True):
            self.add_module(name, stage)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of pictures `(B, C, H, W)`."""
        for name in self._names:
            x = getattr(self, name)(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    """A convolution without bias that keeps the size but for its stride, and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs)


_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey, ITU-R BT.601


def takes_grey(model: nn.Module) -> bool:
    """Whether a model's first convolution takes pictures of one channel.

    >>> takes_grey(nn.Conv2d(1, 8, 3))
    True
    """
    found = (module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return next(found, None) == 1


def from_classifier(output: Any, model: nn.Module) -> bool:
    """Whether an output `(B, K)` is as wide as a last linear layer that changes the width, as classifiers do.

    >>> from_classifier(torch.rand(2, 7), nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 7)))
    True
    >>> from_classifier(torch.rand(2, 32), nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32)))
    False
    """
    layers = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    last = layers[-1] if layers else None
    if not isinstance(output, Tensor) or output.dim() != 2 or not isinstance(last, nn.Linear):
        return False
    return output.shape[1] == last.out_features != last.in_features


def grey_value(values: Sequence[float]) -> tuple[float, ...]:
    """A colour's mean or deviation as that of its grey.

    >>> [round(value, 3) for value in grey_value((0.5, 0.5, 0.5))]
    [0.5]
    """
    return (sum(share * value for share, value in zip(_LUMA, values, strict=True)),)


class Preprocess(nn.Module):
    """Pictures of a batch as one model wants them: floating point, its size, its normalisation.

    Holds no state of its own in `state_dict`.

    Args:
        mean, std: per channel, on the scale 0 to 1.
        size: `(H, W)` to resize to (bilinear, antialiased); None keeps the size.
        channels: that the model takes: grey pictures are repeated, colours become grey for one channel;
            None takes them as they come.

    >>> white = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    >>> round(Preprocess((0.5,), (0.5,))(white).max().item(), 6)
    1.0
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int] | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        self.size, self.channels = size, channels
        for name, values in (("mean", mean), ("std", std)):
            values = [*values] * (channels or 1) if len(values) == 1 else values
            # a grey picture minus three means is a picture of three channels
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def instead_of(self, other: "Preprocess") -> "Preprocess":
        """This one in the place of another that makes the same of every picture; else the other.

        >>> ours, theirs = Preprocess((0.5,), (0.5,)), Preprocess((0.5,), (0.25,))
        >>> ours.instead_of(theirs) is theirs
        True
        """
        alike = (self.size, self.channels) == (other.size, other.channels)
        same = alike and torch.equal(self.mean, other.mean) and torch.equal(self.std, other.std)
        return self if same else other

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """`(B, C, H, W)`, or a list of `(C, H, W)`, uint8 or float in 0 to 1, to normalised float."""
        if isinstance(images, list):
            return [self._one(image[None])[0] for image in images]
        return self._one(images)

    def _one(self, images: Tensor) -> Tensor:
        scale, shift = 1 / self.std, -self.mean / self.std
        if not images.is_floating_point():  # what follows is linear: 0 to 255 may stay until the end
            images, scale = images.to(self.mean.dtype), scale / 255
        elif images.dtype == torch.float64:  # as NumPy makes them
            images = images.to(self.mean.dtype)
        if self.size is not None and images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        if self.channels == 1 and images.shape[1] == 3:
            red, green, blue = (images[:, i : i + 1] * share for i, share in enumerate(_LUMA))
            images = red + green + blue
        precise = torch.promote_types(images.dtype, scale.dtype)
        return torch.addcmul(shift.to(precise), images.to(precise), scale.to(precise))
