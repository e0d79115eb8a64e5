"""A run folder: what is in it, how it is written and read."""

import csv
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffkd.errors import UserError

History = list[dict[str, float]]


class RunFolder:
    """One run on disk.

    ```
    recipe.yaml      the resolved recipe: all that is needed to run it again
    data.txt         a fingerprint of the data, so that the run is not continued on other data
    metrics.csv      one row per evaluation
    summary.json     figures of the finished run
    log.txt          what the run said
    events.out.*     TensorBoard
    checkpoints/     the last two and the best, each with its checksum in its name
    student/         model.safetensors (keys of the plain model) and config.json
    curves.png
    ```

    Every file is written beside its place, synced and renamed, so that a reader never sees half.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def student_file(self) -> Path:
        """The weights that ship."""
        return self.path / "student" / "model.safetensors"

    def exists(self) -> bool:
        """Whether there is anything at the place."""
        return self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))

    def create(self, recipe: str) -> None:
        """Makes the folder with its recipe.

        Raises:
            UserError: the place is not writable.
        """
        with saying_where(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.write_text("recipe.yaml", recipe)

    def write_text(self, name: str, text: str) -> None:
        """Replaces a small file."""
        write_atomically(self.path / name, lambda place: place.write_text(text))

    def say(self, line: str) -> None:
        """Appends a line to log.txt."""
        with (self.path / "log.txt").open("a") as log:
            log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")

    def append_history(self, history: History) -> None:
        """The newest row at the end of metrics.csv; the file anew where its columns are others."""
        place, row = self.path / "metrics.csv", history[-1]
        with saying_where(place):
            header = place.open().readline() if len(history) > 1 and place.is_file() else ""
            if header != ",".join(row) + "\n":
                self.write_history(history)
                return
            with place.open("a") as file:
                file.write(",".join(map(str, row.values())) + "\n")

    def write_history(self, history: History) -> None:
        """metrics.csv anew, of all rows so far; a column that a row lacks stays empty."""
        columns = list(dict.fromkeys(key for row in history for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        self.write_text("metrics.csv", text.getvalue())

    def read_history(self) -> History:
        """metrics.csv as rows of numbers.

        Raises:
            UserError: the file is missing or not readable.
        """
        with saying_where(self.path / "metrics.csv"), (self.path / "metrics.csv").open() as file:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json; its presence says that the run is finished."""
        self.write_text("summary.json", json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """The figures of a finished run.

        Raises:
            UserError: this is no run folder, or the run has not finished.
        """
        place = self.path / "summary.json"
        if not self.path.is_dir() or not self.recipe_file.is_file():
            raise UserError(f"'{self.path}' is not a run folder (it has no recipe.yaml)")
        if not place.is_file():
            raise UserError(f"the run in '{self.path}' has not finished; {resume_hint(self.path)}")
        try:
            return json.loads(place.read_text())  # type: ignore[no-any-return]
        except (OSError, ValueError) as error:
            raise UserError(f"'{place}' cannot be read: {error}") from error

    @property
    def finished(self) -> bool:
        """Whether the run went to its end."""
        return (self.path / "summary.json").is_file()

    def write_student(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """The student alone, as it ships."""
        folder = self.path / "student"
        folder.mkdir(exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        write_atomically(self.student_file, lambda place: save_file(_unshared(tensors), place))
        self.write_text("student/config.json", json.dumps(config, indent=2) + "\n")

    # --- checkpoints -----------------------------------------------------------------------------

    def save_checkpoint(self, step: int, write: Callable[[Path], None], keep: Sequence[int] = ()) -> Path:
        """Writes a checkpoint and forgets older ones, but for the last two and those of `keep`.

        Args:
            step: optimizer steps done.
            write: writes the state to the path that it is given.
            keep: steps whose checkpoints stay.

        Raises:
            UserError: it could not be written; older checkpoints are untouched.
        """
        partial = self.checkpoints / f"writing-{step:09d}.tmp"
        try:
            write(partial)
            final = self.checkpoints / f"step-{step:09d}-{_crc(partial):08x}.pt"
            _settle(partial, final)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise UserError(
                f"checkpoint of step {step} cannot be written to '{self.checkpoints}': {_reason(error)}; "
                f"earlier checkpoints are intact, make room and {resume_hint(self.path)}"
            ) from error
        kept = {_step(path) for path in self.list_checkpoints()[-2:]} | set(keep)
        for path in self.list_checkpoints():
            if _step(path) not in kept:
                path.unlink()
        return final

    def list_checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step-*.pt"), key=_step)

    def newest_checkpoint(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose content fits its checksum; damaged ones are told of and skipped."""
        for leftover in self.checkpoints.glob("writing-*.tmp"):
            leftover.unlink()
        for path in reversed(self.list_checkpoints()):
            if f"{_crc(path):08x}" == path.stem.rpartition("-")[2]:
                return path
            warn(f"checkpoint '{path}' is damaged and set aside; the one before is used")
            path.rename(path.with_suffix(".damaged"))
        return None


def resume_hint(path: Path) -> str:
    """How to go on with an unfinished run."""
    return f"go on with: diffkd distill {path / 'recipe.yaml'} output={path} resume=true"


def write_atomically(place: Path, write: Callable[[Path], object]) -> None:
    """Writes beside the place, syncs, renames: the place holds the old content or the new."""
    partial = place.with_name(place.name + ".tmp")
    try:
        write(partial)
        _settle(partial, place)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def saying_where(place: Path) -> Iterator[None]:
    """Turns an operating system's error into one line that names the place."""
    try:
        yield
    except OSError as error:
        raise UserError(f"'{place}': {_reason(error)}") from error


def free_space(place: Path) -> int:
    """Bytes free where `place` is, or would be."""
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content; holds tensors and plain values, never code."""
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def _settle(partial: Path, final: Path) -> None:
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _crc(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _step(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0]


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights as separate tensors: safetensors takes no shared memory."""
    seen: set[int] = set()
    separate = {}
    for name, value in tensors.items():
        separate[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return separate
