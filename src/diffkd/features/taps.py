"""Reads features out of any module by layer path, channels first."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffkd.errors import UserError, nearest
from diffkd.features.layouts import LAYOUTS, Evidence, Layout, prefix_tokens, tell_layout
from diffkd.features.watch import watching


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

    >>> import torch
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
        self.seen: tuple[int, ...] | None = None

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
        with watching(self._model) as watched:
            run()
        self.seen = watched.seen or image_size
        self._entries, self._layouts = [], {}
        for request in self._requests:
            for name, key, feature in self._expand(request):
                if not feature.is_floating_point():
                    kind = str(feature.dtype)
                    raise UserError(
                        f"tap '{name}' gives integers ({kind}), which carry no gradient; "
                        "tap a floating-point layer"
                    )
                evidence = Evidence(
                    watched.leaves.get(request.path, []), self.seen, prefix_tokens(self._model)
                )
                self._entries.append((name, request.path, key))
                self._layouts[name] = tell_layout(name, feature, request.axes, evidence)
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
