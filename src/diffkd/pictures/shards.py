"""Pictures in tar files, read in place: an index of their members is built once and kept."""

import json
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffkd.errors import UserError, first_line
from diffkd.pictures.decoding import ENDINGS
from diffkd.pictures.files import Item, Texts
from diffkd.pictures.kept import Kept
from diffkd.pictures.options import quoted
from diffkd.pictures.progress import watched

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"\x28\xb5": "unzstd"}
_FIELDS = ("label", "cls", "class", "class_name", "target")
_MOST_LABEL = 1 << 20  # bytes
_WORTH = 1.0  # seconds of reading that are worth a file in the cache
_NONE = -1  # code of a sample without a label


@dataclass(frozen=True)
class Endings:
    """Which members of a sample are its picture and its label.

    Attributes:
        image: ending of the picture, such as "jpg"; "" takes the only one that is a picture's.
        label: ending of the label; "" where labels are not wanted.
        field: of a JSON label; "" takes the first usual one.
    """

    image: str = ""
    label: str = ""
    field: str = ""


class Shards:
    """The samples of tar files: members of one name up to its first dot, as `cat/7.jpg` and `cat/7.cls`.

    Args:
        places: the tar files.
        endings: which members count.

    Attributes:
        labels: the different labels as they are written; `codes` `(N,)` say which one a sample has.
        targets: `(N,)` class index of each; None where there are none.
        left_out: samples that lack something, by what, with their number.

    Raises:
        UserError: a file is missing, damaged or compressed, or no sample is whole; it is named.
    """

    def __init__(self, places: Sequence[Path], endings: Endings) -> None:
        self.shards, self.endings = tuple(places), endings
        kept = Kept("shards", (*endings.__dict__.values(), *map(str, places)))
        signs, begin = np.array([_sign(place) for place in places], np.int64), time.perf_counter()
        arrays = kept.load()
        if not ("signs" in arrays and np.array_equal(arrays["signs"], signs)):
            arrays = _packed(_samples(self.shards, endings)) | {"signs": signs}
            if time.perf_counter() - begin > _WORTH:
                kept.save(arrays)
        self._where, self.codes = arrays["where"], arrays["codes"]
        self._names = Texts()
        self._names.blocks = arrays["names"], arrays["ends"]
        told = json.loads(arrays["told"].tobytes())
        self.labels, self.left_out = tuple(told["labels"]), Counter(told["left_out"])
        self.targets: np.ndarray | None = None
        if not len(self):
            lacking = "; ".join(f"{count:,} {what}" for what, count in self.left_out.items())
            raise UserError(f"no samples in '{places[0]}'{' and the like' * (len(places) > 1)}: {lacking}")

    def __len__(self) -> int:
        return len(self._where)

    def number(self, known: Mapping[str, int]) -> None:
        """Gives samples with a label their class indices.

        Args:
            known: the class index of each label.

        Raises:
            UserError: a label has none.
        """
        if not self.labels:
            return
        for code, label in enumerate(self.labels):
            if known.get(label, -1) < 0:
                name = self.name(int(np.argmax(self.codes == code)))
                raise UserError(f"'{name}' has the label '{label[:40]}', which is no class to train on")
        self.targets = np.array([known[label] for label in self.labels], np.int64)[self.codes]

    def name(self, index: int) -> str:
        """What an error calls a sample: its file and the member in it."""
        return f"{self.shards[self._where[index, 0]]}: {self._names[index]}"

    def __getitem__(self, index: int) -> Item:
        shard, offset, size = self._where[index].tolist()
        try:
            with self.shards[shard].open("rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise UserError(f"cannot read '{self.shards[shard]}': {error.strerror}") from error
        return Item(self.name(index), content, None if self.targets is None else int(self.targets[index]))

    def notes(self) -> tuple[str, ...]:
        """One line on what was left out, if anything was."""
        if not self.left_out:
            return ()
        lacking = ", ".join(f"{count:,} {what}" for what, count in self.left_out.items())
        return (f"left out in '{self.shards[0]}'{' and the like' * (len(self.shards) > 1)}: {lacking}",)


@dataclass
class _Sample:
    """A whole sample, or what is found of it."""

    name: str = ""
    where: tuple[int, int, int] = (0, 0, 0)
    label: str | None = None


def _samples(places: Sequence[Path], endings: Endings) -> Iterator[_Sample | str]:
    """Samples of all files in order; in place of one that lacks something, what it lacks."""
    for shard, place in enumerate(watched(places, len(places), "reading shards")):
        grouped = _grouped(place)
        with place.open("rb") as file:
            for members in grouped.values():
                try:
                    yield _sample(shard, file, members, endings)
                except _Lacking as lacking:
                    yield str(lacking)


class _Lacking(Exception):  # noqa: N818 (no error: it is counted)
    """What a sample lacks."""


_Member = tuple[str, int, int]  # name, where its content begins, bytes


def _grouped(place: Path) -> dict[str, dict[str, _Member]]:
    """Members of a tar file by sample and ending."""
    found: dict[str, dict[str, _Member]] = {}
    for member in _members(place):
        folder, slash, base = member[0].rpartition("/")
        key, dot, ending = base.partition(".")
        if dot and key:
            found.setdefault(f"{folder}{slash}{key}", {})[ending.lower()] = member
    return found


def _members(place: Path) -> Iterator[_Member]:
    """The regular files in a tar file."""
    try:
        with place.open("rb") as file:
            command = _COMPRESSED.get(file.read(2))
        if command is not None:
            raise UserError(
                f"'{place}' is compressed, so that no picture in it can be read alone: {command} '{place}'"
            )
        with tarfile.open(place, "r:") as tar:
            for member in tar:
                if member.isreg():
                    yield member.name, member.offset_data, member.size
                tar.members = []  # type: ignore[attr-defined]  # else all that were read are held
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"cannot read '{place}' as a tar file: {first_line(error)}") from error


def _sample(shard: int, file: BinaryIO, members: dict[str, _Member], endings: Endings) -> _Sample:
    """The sample that some members of an open tar file make.

    Raises:
        _Lacking: it has no picture, or no label where one is wanted.
        UserError: it has two pictures, or a label that cannot be read.
    """
    pictures = [e for e in members if e == endings.image or (not endings.image and f".{e}" in ENDINGS)]
    if not pictures:
        raise _Lacking("without a picture" + (f" (.{endings.image})" if endings.image else ""))
    name, offset, size = members[pictures[0]]
    if len(pictures) > 1:
        raise UserError(f"'{file.name}: {name}' has {quoted(pictures)}: data.image_ending= one of them")
    if not endings.label:
        return _Sample(name, (shard, offset, size))
    if endings.label not in members:
        raise _Lacking(f"without a label (.{endings.label})")
    return _Sample(name, (shard, offset, size), _label(file, members[endings.label], endings))


def _label(file: BinaryIO, member: _Member, endings: Endings) -> str:
    name, offset, size = f"{file.name}: {member[0]}", *member[1:]
    try:
        file.seek(offset)
        text = file.read(min(size, _MOST_LABEL)).decode().strip()
        found: Any = json.loads(text) if endings.label == "json" else text
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read label '{name}': {first_line(error)}") from error
    if endings.label == "json":
        keys = (endings.field,) if endings.field else _FIELDS
        known = found if isinstance(found, dict) else {}
        found = next((known[key] for key in keys if key in known), None)
        if not isinstance(found, int | str) or isinstance(found, bool):
            there = f"; there are {quoted(list(known), 6)}" if known else ""
            raise UserError(f"'{name}' has no label in {quoted(keys, 5)}{there}: data.label_field=NAME")
    if found == "":
        raise UserError(f"label '{name}' is empty")
    return str(found)


def _packed(samples: Iterable[_Sample | str]) -> dict[str, np.ndarray]:
    """An index in few blocks of memory."""
    where: list[tuple[int, int, int]] = []
    codes: list[int] = []
    labels: dict[str, int] = {}
    left_out: Counter[str] = Counter()

    def names() -> Iterator[str]:
        for sample in samples:
            if isinstance(sample, str):
                left_out[sample] += 1
                continue
            where.append(sample.where)
            codes.append(_NONE if sample.label is None else labels.setdefault(sample.label, len(labels)))
            yield sample.name

    text, ends = Texts(names()).blocks
    told = json.dumps({"labels": list(labels), "left_out": left_out}).encode()
    return {
        "where": np.array(where, np.int64).reshape(-1, 3),
        "codes": np.array(codes, np.int64),
        "names": text,
        "ends": ends,
        "told": np.frombuffer(told, np.uint8),
    }


def _sign(place: Path) -> tuple[int, int]:
    try:
        told = place.stat()
    except OSError as error:
        raise UserError(f"no shard '{place}'") from error
    return told.st_size, told.st_mtime_ns


def first_endings(place: Path) -> set[str]:
    """Endings of the members of a tar file's first samples."""
    found: set[str] = set()
    for count, (name, _, _) in enumerate(_members(place)):
        found.add(name.rpartition("/")[2].partition(".")[2].lower())
        if count >= 100:
            break
    return found
