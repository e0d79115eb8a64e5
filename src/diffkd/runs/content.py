"""What a data set holds, as short digests: every label, every file by its path, size and sampled content."""

import hashlib
import os
import stat
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffkd.data.base import BatchedSplit, Data

UNLABELLED = "training pictures without labels"
# Files whose content is looked into; of more, as many are, evenly spread. The sizes of all count.
MOST_FILES = 20_000
# Bytes read of all files together, shared out evenly; each file gives its beginning, middle and end.
MOST_BYTES = 256 * 2**20
_LEAST_BYTES = 12 * 1024
_LABELS = ("targets", "target", "labels", "label", "_labels", "y", "boxes", "masks", "annotations")
# How samples are looked at is said by recipe and code; the rest changes while a run goes on.
_SKIPPED = ("transform", "transforms", "target_transform", "loader", "cache", "_cache")
_DEPTH = 6


def digests(data: Data, root: str | None) -> dict[str, str]:
    """Digests of the pictures and labels of both splits, of the classes, and of pictures without labels.

    A split of one's own may say what it holds itself: `fingerprint() -> str`.

    Args:
        data: as it was built, before a sample was taken: a split may fill a cache of its own.
        root: the folder whose place does not count; paths within it count relative to it.
    """
    files = _Files(root)
    found = {"classes": _short(repr((data.num_classes, tuple(data.class_names))).encode())}
    for name, split in (("training", data.train), ("test", data.test)):
        content = _Content(files)
        content.split(split)
        found[f"{name} pictures"] = content.pictures.hexdigest()
        found[f"{name} labels"] = content.labels.hexdigest()
    if data.unlabelled is not None:
        content = _Content(files)
        content.split(data.unlabelled)
        found[UNLABELLED] = content.pictures.hexdigest()
    return found


def file_digest(place: Path) -> str:
    """Digest of a whole file; "missing" where there is none.

    >>> file_digest(Path("no such file"))
    'missing'
    """
    try:
        with place.open("rb") as file:
            return hashlib.file_digest(file, _new).hexdigest()
    except OSError:
        return "missing"


def _new() -> Any:
    return hashlib.blake2b(digest_size=8)


def _short(content: bytes) -> str:
    return str(hashlib.blake2b(content, digest_size=8).hexdigest())


class _Content:
    """Digests of one split's pictures and labels."""

    def __init__(self, files: "_Files") -> None:
        self.files, self.pictures, self.labels = files, _new(), _new()
        self.paths: list[str] = []
        self.seen: set[int] = set()

    def split(self, split: Any) -> None:
        """All that a split holds."""
        known = self._known(split)
        if not known:
            self._take(split, self.pictures, 0)
            self._samples(split)
        if self.paths:
            self.pictures.update(self.files.digest("", self.paths).encode())

    def _known(self, value: Any) -> bool:
        """Takes what the library's own splits hold; False where it is none of them."""
        if callable(getattr(value, "fingerprint", None)):
            self.pictures.update(str(value.fingerprint()).encode())
        elif isinstance(getattr(value, "images", None), Tensor) and hasattr(value, "targets"):
            self._take(value.images, self.pictures, 0)
            for name in _LABELS:
                self._take(getattr(value, name, None), self.labels, 0)
        elif hasattr(value, "shards"):
            self.pictures.update(self.files.digest("", [str(place) for place in value.shards]).encode())
            self._take(value.targets, self.labels, 0)
        elif hasattr(value, "source"):
            self._take(getattr(value, "places", None), self.pictures, 0)
            self._take(value.source, self.pictures, 0)
            self._take(getattr(getattr(value, "table", None), "codes", None), self.labels, 0)
        elif callable(getattr(value, "picture", None)) and callable(getattr(value, "file", None)):
            for find, into in ((value.picture, self.pictures), (value.file, self.labels)):
                files = dict.fromkeys(str(find(i)) for i in range(len(value)))
                into.update(self.files.digest("", list(files)).encode())
        elif isinstance(getattr(value, "folder", None), Path) and len(value):
            listed = isinstance(getattr(value, "paths", None), np.ndarray)
            names = [os.fsdecode(bytes(p)) for p in value.paths] if listed else None
            names = names or [value.path(i) for i in range(len(value))]
            self.pictures.update(self.files.digest(str(value.folder), names).encode())
            for name in (*_LABELS, "starts", "ignore"):
                self._take(getattr(value, name, None), self.labels, 0)
        elif hasattr(getattr(value, "rows", None), "features"):
            self._rows(value)
        else:
            return False
        return True

    def _rows(self, value: Any) -> None:
        """Rows of an Arrow table, whose pictures lie in it or beside it."""
        self._take(value.targets, self.labels, 0)
        rows = value.rows.select_columns([value.image])
        if len(rows) and rows[0][value.image]["bytes"] is None:
            paths = [stored["path"] for stored in rows[value.image]]
            self.pictures.update(self.files.digest("", paths).encode())
            return
        for column in rows.data.columns:
            for chunk in column.chunks:
                for buffer in chunk.buffers():
                    self.pictures.update(_sampled(memoryview(buffer)) if buffer is not None else b"")

    def _take(self, value: Any, into: Any, depth: int) -> None:
        """Whatever holds plain values, arrays and paths."""
        if value is None or isinstance(value, bool | int | float | complex | np.generic):
            into.update(f"{value!r};".encode())
        elif isinstance(value, str | Path):
            self._text(value, into)
        elif isinstance(value, bytes):
            into.update(value)
        elif isinstance(value, Tensor | np.ndarray):
            into.update(_array(value))
        elif depth < _DEPTH and id(value) not in self.seen:
            self._inside(value, into, depth + 1)

    def _text(self, value: str | Path, into: Any) -> None:
        inside = self.files.relative(str(value))
        into.update(f"{inside};".encode(errors="surrogateescape"))
        if isinstance(value, Path) or inside != value:
            self.paths.append(str(value))

    def _inside(self, value: Any, into: Any, depth: int) -> None:
        if not isinstance(value, _NO_CONTENT) and self._known(value):
            return
        if isinstance(value, Mapping):
            for key, item in value.items():
                self._named(str(key), item, into, depth)
        elif isinstance(value, list | tuple | set | frozenset):
            for item in sorted(value, key=repr) if isinstance(value, set | frozenset) else value:
                self._take(item, into, depth)
        elif not isinstance(value, _NO_CONTENT) and hasattr(value, "__dict__"):
            self.seen.add(id(value))
            for key, item in vars(value).items():
                self._named(key, item, into, depth)

    def _named(self, name: str, value: Any, into: Any, depth: int) -> None:
        if name not in _SKIPPED:
            into.update(f"{name}=".encode(errors="surrogateescape"))
            self._take(value, self.labels if name in _LABELS else into, depth)

    def _samples(self, split: Any) -> None:
        """A few samples of a split that is not the library's own, which may make them as it goes."""
        places = np.unique(np.linspace(0, len(split) - 1, 16).round()).astype(int)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if isinstance(split, BatchedSplit):
                self._take(tuple(split.batch(torch.from_numpy(places), 0)), self.pictures, 0)


_NO_CONTENT = (FunctionType, MethodType, ModuleType, type, nn.Module, torch.Generator, np.random.Generator)


def _array(value: Tensor | np.ndarray) -> bytes:
    """Shape, kind and content of an array."""
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return repr(value.tolist()).encode()
    tensor = value.detach().cpu() if isinstance(value, Tensor) else value
    told = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}".encode()
    if isinstance(tensor, Tensor):
        plain = tensor.contiguous().flatten()
        content = (plain if plain.numel() else plain.to(torch.uint8)).view(torch.uint8).numpy()
    else:
        content = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    return told + zlib.crc32(content.data).to_bytes(4, "big") + zlib.adler32(content.data).to_bytes(4, "big")


def _sampled(content: memoryview) -> bytes:
    """A checksum of a block of memory; of a very large one, of 4,096 pieces of it."""
    if content.nbytes <= 2**30:
        return zlib.crc32(content).to_bytes(4, "big")
    checksum = content.nbytes
    for start in np.linspace(0, content.nbytes - 2**14, 4096).astype(int).tolist():
        checksum = zlib.crc32(content[start : start + 2**14], checksum)
    return checksum.to_bytes(8, "big")


class _Files:
    """Files by path, size and sampled content; those of a folder are looked at once."""

    def __init__(self, root: str | None) -> None:
        if root and not Path(root).is_dir():  # the name of files in it
            root = os.path.dirname(root)  # noqa: PTH120
        self.root = os.path.join(os.path.realpath(Path(root).expanduser()), "") if root else None  # noqa: PTH118
        self.given = os.path.join(Path(root).expanduser(), "") if root else None  # noqa: PTH118
        self._known: dict[tuple[str, int, int], str] = {}

    def relative(self, path: str) -> str:
        """A path as it counts."""
        for root in (self.given, self.root):
            if root and path.startswith(root):
                return path[len(root) :]
        return path

    def digest(self, folder: str, names: Sequence[str]) -> str:
        """One digest of all the files `names` in a folder."""
        key = (folder, len(names), hash(tuple(names)))
        if key not in self._known:
            self._known[key] = self._look(folder, names)
        return self._known[key]

    def _look(self, folder: str, names: Sequence[str]) -> str:
        begin = f"{folder}{os.sep}" if folder else ""
        places = [name if os.path.isabs(name) else begin + name for name in names]  # noqa: PTH117
        sizes = [_size(place) for place in places]
        told = (f"{self.relative(place)}\0{size}" for place, size in zip(places, sizes, strict=True))
        digest = _new()
        digest.update("\n".join(told).encode(errors="surrogateescape"))
        every = -(-len(places) // MOST_FILES) or 1
        chosen = range(0, len(places), every)
        share = max(MOST_BYTES // max(len(chosen), 1), _LEAST_BYTES)
        if sum(sizes[i] for i in chosen) <= MOST_BYTES:
            share = MOST_BYTES
        digest.update(np.array([_peek(places[i], sizes[i], share) for i in chosen], np.uint32).tobytes())
        return str(digest.hexdigest())


def _size(place: str) -> int:
    """Bytes of a regular file; -1 where there is none, for what is no file may never end."""
    try:
        told = os.stat(place)  # noqa: PTH116
    except (OSError, ValueError):
        return -1
    return told.st_size if stat.S_ISREG(told.st_mode) else -1


def _peek(place: str, size: int, share: int) -> int:
    """A checksum of a file's content, or of its beginning, middle and end."""
    if size < 0:
        return 0
    try:
        with open(place, "rb", buffering=0) as file:  # noqa: PTH123
            if size <= share:
                return zlib.crc32(file.read(share))
            part, checksum = share // 3, 0
            for start in (0, (size - part) // 2, size - part):
                file.seek(start)
                checksum = zlib.crc32(file.read(part), checksum)
            return checksum
    except OSError:
        return 0


def combined(parts: Iterable[str]) -> str:
    """One short digest of several.

    >>> combined(["a"]) == combined(["a"]), combined(["a", "b"]) == combined(["b", "a"])
    (True, False)
    """
    return _short("\n".join(parts).encode())
