"""timm's image models: `timm/resnet50`, with `weights: pretrained` or a tag such as `a1_in1k`."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import timm
from huggingface_hub import constants as hub
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from diffkd.errors import UserError, first_line, nearest
from diffkd.models.base import Wants


def build(
    name: str,
    *,
    in_channels: int = 3,
    image_size: tuple[int, ...] = (224, 224),
    num_classes: int = 1000,
    **options: Any,
) -> nn.Module:
    """A model of timm with fresh weights.

    Raises:
        UserError: there is no such model (the nearest names are given), or it does not take an option.

    >>> build("resnet10t", num_classes=5).num_classes
    5
    """
    _check(name)
    if _fixed_size(name) not in (None, image_size[0]):
        options = {"img_size": image_size, **options}
    sizes = {"num_classes": num_classes, "in_chans": in_channels}
    try:
        return timm.create_model(name, **{**sizes, **options})
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"model 'timm/{name}' cannot be built: {reason}") from error


def wants(name: str, weights: str | None) -> Wants:
    """The model's fixed size if it has one; of published weights also size, mean and deviation."""
    _check(name)
    config = timm.get_pretrained_cfg(_tagged(name, weights))
    if weights is None or config is None:
        return Wants(size=_fixed_size(name))
    return Wants(config.input_size[-1], tuple(config.mean), tuple(config.std), config.input_size[0])


def state(name: str, weights: str) -> dict[str, Tensor]:
    """Published weights: "pretrained" for timm's choice, or a tag of the model.

    Raises:
        UserError: the model has no such weights, or they cannot be fetched.
    """
    _check(name)
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{name.partition('.')[0]}.*")]
    if weights != "pretrained" and weights not in tags:
        raise UserError(
            f"no weights file '{weights}', nor weights of that name for 'timm/{name}'"
            f"{nearest(weights, ['pretrained', *tags])}"
        )
    try:
        with _hub():
            found: dict[str, Tensor] = timm.create_model(_tagged(name, weights), pretrained=True).state_dict()
    except LocalEntryNotFoundError as error:
        reason = f"no way to {hub.ENDPOINT}, and they are not in its cache"
        raise UserError(f"weights '{weights}' of 'timm/{name}' cannot be fetched: {reason}") from error
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"weights '{weights}' of 'timm/{name}' cannot be fetched: {reason}") from error
    return found


@contextmanager
def _hub() -> Iterator[None]:
    """Where the hub cannot be reached, its library asks its cache at once instead of trying for a minute."""
    before = hub.HF_HUB_OFFLINE
    try:
        socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, 443)
    except OSError:
        hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def names() -> list[str]:
    """All of them."""
    return list(timm.list_models())


def _check(name: str) -> None:
    if not timm.is_model(name):
        raise UserError(f"unknown model 'timm/{name}'{nearest(name.partition('.')[0], timm.list_models())}")


def _tagged(name: str, weights: str | None) -> str:
    return name if weights in (None, "pretrained") else f"{name.partition('.')[0]}.{weights}"


def _fixed_size(name: str) -> int | None:
    """Side of the pictures of models that take one size."""
    config = timm.get_pretrained_cfg(name)
    return config.input_size[-1] if config is not None and config.fixed_input_size else None
