"""Reads features out of any module by layer path, channels first."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.errors import UserError, nearest
from diffkd.features.layouts import LAYOUTS, Evidence, Layout, prefix_tokens, tell_layout
from diffkd.features.outputs import class_scores, entries_of, entry
from diffkd.features.watch import watching


class Taps:
    """Features of a model, read by layer path while it runs, handed out channels first.

    A path may choose one entry of a list, dict or object that a layer gives (`fpn[0]`, `[out]`, `[logits]`),
    and say the layout where the dry run cannot tell it (`stages.3@BHWC`). A layer that runs several times
    gives what it gave last. The model carries hooks while `collect` and `probe` run it, and never else.

    Args:
        model: any module. Of a TorchScript module only the output can be tapped.
        layers: paths as in `model.named_modules()`; "" is the model's output, its `logits` where it has such.

    Raises:
        UserError: a path or layout does not exist; the nearest ones are given.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Flatten())
    >>> taps = Taps(model, ["0", ""])
    >>> taps.probe(lambda: model(torch.rand(2, 3, 8, 8)), (8, 8))
    {'0': (8, 4, 4), '': (128,)}
    >>> output = taps.collect(lambda: model(torch.rand(2, 3, 8, 8)))
    >>> {name: tuple(feature.shape) for name, feature in taps.read().items()}
    {'0': (2, 8, 4, 4), '': (2, 128)}
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], *, scores: bool = False) -> None:
        self._model, self._scores = model, scores
        self._requests = [_Request.parse(layer) for layer in layers]
        known = dict(model.named_modules(remove_duplicate=False))
        for request in self._requests:
            if request.path not in known:
                raise UserError(
                    f"no layer '{request.path}' in {type(model).__name__}{nearest(request.path, known)}"
                    + "; the model's output is ''" * (request.path == "output")
                )
            if request.path and isinstance(known[request.path], torch.jit.ScriptModule):
                raise UserError(
                    f"layer '{request.path}' of {type(model).__name__} is TorchScript, which cannot be "
                    "looked into; tap the model's output: taps={'': ''}"
                )
        self._store: dict[str, Any] = {}
        paths = dict.fromkeys(request.path for request in self._requests)
        self._hooks = [
            (known[path], _Keep(self._store, path))
            for path in paths
            if not isinstance(known[path], torch.jit.ScriptModule)
        ]
        self._above = _above(known, list(paths))
        self._layouts: dict[str, Layout] = {}
        self._entries: list[tuple[str, str, str | int | None]] = []
        self.without_gradient: tuple[str, ...] = ()
        self.seen: tuple[int, ...] | None = None

    def probe(self, run: Callable[[], Any], image_size: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
        """One dry run, from which each feature's layout is told.

        Args:
            run: runs the model on a sample.
            image_size: `(H, W)` of the pictures in the sample, where there are pictures; what the model
                makes of them (`seen`) is found out.

        Returns:
            `(C, *S)` of each feature by its name; a layer that gives several gives as many names.

        Raises:
            UserError: a layer did not run, gives integers, or its layout cannot be told.
        """
        with watching(self._model) as watched:
            self.collect(run)
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
                leaves = watched.leaves.get(request.path, [])
                evidence = Evidence(leaves, self.seen, prefix_tokens(self._model))
                self._entries.append((name, request.path, key))
                self._layouts[name] = tell_layout(name, feature, request.axes, evidence)
        raw = {name: entry(self._store[path], key) for name, path, key in self._entries}
        self.without_gradient = tuple(name for name, feature in raw.items() if not feature.requires_grad)
        return {name: tuple(feature.shape[1:]) for name, feature in self.read().items()}

    def collect(self, run: Callable[[], Any], answer: Callable[[Any], Any] | None = None) -> Any:
        """Runs the model with the hooks on, and keeps what the tapped layers give until `read`.

        Args:
            run: runs the model. What it returns stands for the model's output where that was not called
                as a whole, or is TorchScript.
            answer: takes the model's output out of what `run` returns; None where it is that.
        """
        self._store.clear()
        compiling = torch.compiler.is_compiling()
        before = [module._forward_hooks for module, _ in self._hooks]
        for module, hook in self._hooks:
            # The dict is replaced and not changed: a graph that is being traced sees an assignment only.
            module._forward_hooks = OrderedDict({**module._forward_hooks, _KEY: hook})
        marked = [] if compiling else _mark(self._above)
        try:
            output = run()
        finally:
            for (module, _), hooks in zip(self._hooks, before, strict=True):
                module._forward_hooks = hooks
            for module in marked:
                del module.forward
        if "" not in self._store:
            self._store[""] = output if answer is None else answer(output)
        return output

    def read(self) -> dict[str, Tensor]:
        """The features `(B, C, *S)` of the forward pass that was collected, by name; then forgets them.

        Raises:
            UserError: a tapped layer did not run.
        """
        features: dict[str, Tensor] = {}
        for name, path, key in self._entries:
            if path not in self._store:
                raise UserError(f"layer '{path}' did not run in this forward pass; tap another one")
            features[name] = self._layouts[name].apply(entry(self._store[path], key))
        self._store.clear()
        return features

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
        entries = entries_of(output)
        if request.path == "" and request.entry is None and "logits" in entries:
            yield request.name, "logits", entries["logits"]
            return
        known = request.path == "" and request.entry is None and (self._scores or len(entries) == 1)
        scores = class_scores(output)[0] if known else None
        if isinstance(scores, Tensor) and scores.dim() == 2:
            yield request.name, None, scores
            return
        chosen = [key for key in entries if request.entry in (None, str(key))]
        if not chosen:
            there = [str(key) for key in entries]
            word = request.entry or ""
            raise UserError(f"tap '{request.name}': the layer gives no such tensor{nearest(word, there)}")
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


_KEY = "diffkd"  # in a layer's dict of hooks


class _Keep:
    """A hook that keeps a layer's output. A class, so that deep copies of model and taps stay together."""

    def __init__(self, store: dict[str, Any], path: str) -> None:
        self.store, self.path = store, path

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.store[self.path] = output


def _above(known: dict[str, nn.Module], paths: list[str]) -> list[nn.Module]:
    """The modules that tapped layers are inside of, themselves included."""
    found: dict[int, nn.Module] = {}
    for path in ["", *paths]:
        parts = path.split(".") if path else []
        for module in (known[".".join(parts[:i])] for i in range(len(parts) + 1)):
            found[id(module)] = module
    return list(found.values())


def _mark(modules: list[nn.Module]) -> list[nn.Module]:
    """Makes compiled modules look another one while their hooks are on; gives those that it marked.

    A compiled graph is not guarded by the hooks that it was traced with, but by whether an instance has a
    `forward` of its own: so that a graph traced with hooks and one traced without are told apart.
    """
    marked = []
    for module in modules:
        if getattr(module, "_compiled_call_impl", None) is not None and "forward" not in vars(module):
            module.forward = MethodType(type(module).forward, module)
            marked.append(module)
    return marked
