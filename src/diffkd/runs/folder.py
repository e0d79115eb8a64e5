"""A run folder: what is in it, how it is written and read."""

import csv
import io
import json
import os
import platform
import re
import shlex
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from diffkd.errors import UserError
from diffkd.recipe.files import code_names
from diffkd.recipe.reading import read_file
from diffkd.runs.disk import (
    checksum,
    first_line,
    is_full,
    read_json,
    read_whole,
    reason_of,
    saying_where,
    settle,
    write_atomically,
)

History = list[dict[str, float]]

_LOCK, _HOLDER = ".lock", ".holder"
_CHECKED = tuple(
    f"{s}/{n}" for s in ("student", "student-best") for n in ("model.safetensors", "config.json")
)
_CHECKPOINT = re.compile(r"step-\d+-[0-9a-f]{8}\.pt")
# What every summary holds.
_SUMMARY = ("metric", "metric_label", "last", "best", "student", "teacher", "agreement", "device", "seconds")


class RunFolder:
    """One run on disk.

    ```
    recipe.yaml      the resolved recipe: all that is needed to run it again
    identity.json    digests of data, weights, code and versions: the run is continued on the same only
    metrics.csv      one row per evaluation
    summary.json     figures of the finished run
    log.txt          what the run said
    events.out.*     TensorBoard
    checkpoints/     the last two and the best, each with its checksum in its name; when the run is
                     finished the last one's weights alone
    student/         model.safetensors (keys of the plain model) and config.json
    student-best/    the same of the best epoch
    checksums.json   of the student and the summary
    evaluation/      where the student errs
    curves.png
    run.html         all of it to look at
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
        """Whether there is anything at the place but what a run leaves that was ended at its very start."""
        if not self.path.is_dir():
            return self.path.exists() or self.path.is_symlink()
        return any(not _is_leftover(entry) for entry in self.path.iterdir())

    def create(self, recipe: str) -> None:
        """Makes the folder with its recipe.

        Raises:
            UserError: the place is not writable.
        """
        with saying_where(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.write_text("recipe.yaml", recipe)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps the folder for this process; one that was made for it and in which nothing came is removed.

        Raises:
            UserError: another process has it, and who; or the place is not writable.
        """
        fresh = [place for place in (self.path, *self.path.parents) if not place.exists()]
        with saying_where(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock, holder = FileLock(self.path / _LOCK), self.path / _HOLDER
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                who = first_line(holder) or "another process"
                raise UserError(
                    f"run folder '{self.path}' is being written by {who}; wait for it, or set output="
                ) from error
        try:
            with saying_where(self.path):
                started = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
                holder.write_text(f"process {os.getpid()} on {platform.node()} since {started}\n")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()
            if fresh and not self.exists():
                shutil.rmtree(self.path, ignore_errors=True)
                with suppress(OSError):  # others may use them by now
                    for place in fresh[1:]:
                        place.rmdir()

    @property
    def knows_identity(self) -> bool:
        """Whether the run says what it was made with."""
        try:
            return bool(self.read_identity())
        except UserError:
            return False

    def write_identity(self, identity: Mapping[str, Mapping[str, str]]) -> None:
        """identity.json: what the run is made with."""
        self.write_text("identity.json", json.dumps(identity, indent=2) + "\n")

    def read_identity(self) -> dict[str, dict[str, str]]:
        """What the run was made with; empty where it does not say.

        Raises:
            UserError: the file is damaged.
        """
        place = self.path / "identity.json"
        if not place.is_file():
            return {}
        found = read_json(place)
        if not all(isinstance(part, dict) for part in found.values()):
            raise UserError(f"'{place}' is damaged: it is no mapping of digests")
        return found

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
            UserError: the file is missing or damaged.
        """
        place = self.path / "metrics.csv"
        content = read_whole(place)
        try:
            rows = list(csv.DictReader(io.StringIO(content.decode()), strict=True))
            if not content.endswith(b"\n") or any(None in row.values() for row in rows):
                raise ValueError("its last row is cut off")
            history = [{k: float(v) for k, v in row.items() if v} for row in rows]
        except (ValueError, TypeError, csv.Error) as error:
            raise UserError(f"'{place}' is damaged: {reason_of(error)}") from error
        if not history or not all("epoch" in row or "step" in row for row in history):
            raise UserError(f"'{place}' is damaged: it has no rows of epochs")
        return history

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json; its presence says that the run is finished. The checksums are written before."""
        text = json.dumps(summary, indent=2) + "\n"
        checksums = {
            name: f"{checksum(self.path / name):08x}" for name in _CHECKED if (self.path / name).is_file()
        }
        checksums["summary.json"] = f"{zlib.crc32(text.encode()):08x}"
        self.write_text("checksums.json", json.dumps(checksums, indent=2) + "\n")
        self.write_text("summary.json", text)

    def damage(self, *, history: bool = False) -> str | None:
        """What of a finished run is damaged or missing; None where all fits its checksums.

        Args:
            history: also looks whether metrics.csv can be read, which has no checksum.
        """
        place = self.path / "checksums.json"
        try:
            wanted = read_json(place) if place.is_file() else {}
        except UserError as error:
            return str(error)
        for name, recorded in wanted.items():
            if not (self.path / name).is_file():
                return f"'{self.path / name}' is missing"
            if f"{checksum(self.path / name):08x}" != recorded:
                return f"'{self.path / name}' is damaged: its checksum does not fit"
        if history:
            try:
                self.read_history()
            except UserError as error:
                return str(error)
        return None

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
        found = read_json(place)
        lacking = [key for key in _SUMMARY if key not in found]
        if lacking:
            raise UserError(f"'{place}' is damaged: it lacks {lacking[0]}")
        return found

    @property
    def finished(self) -> bool:
        """Whether the run went to its end."""
        return (self.path / "summary.json").is_file()

    def reopen(self) -> None:
        """Takes back that the run is finished, so that its end is written again."""
        with saying_where(self.path):
            (self.path / "summary.json").unlink()

    def write_student(
        self, state: Mapping[str, Tensor], config: Mapping[str, Any], name: str = "student"
    ) -> None:
        """The student alone, as it ships, in a folder of the run's."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        write_atomically(folder / "model.safetensors", lambda place: save_file(_unshared(tensors), place))
        self.write_text(f"{name}/config.json", json.dumps(config, indent=2) + "\n")

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
            self.checkpoints.mkdir(exist_ok=True)
            write(partial)
            final = self.checkpoints / f"step-{step:09d}-{checksum(partial):08x}.pt"
            settle(partial, final)
        except (OSError, RuntimeError) as error:
            full = isinstance(error, RuntimeError) and is_full(self.path, error)
            reason = f"no space left on the disk ({reason_of(error)})" if full else reason_of(error)
            partial.unlink(missing_ok=True)
            raise UserError(
                f"checkpoint of step {step} cannot be written to '{self.checkpoints}': {reason}; "
                f"earlier checkpoints are intact, make room and {resume_hint(self.path)}"
            ) from error
        kept = set(keep) | set(sorted({step_of(path) for path in self.list_checkpoints()})[-2:])
        for path in self.list_checkpoints():
            if step_of(path) not in kept or (step_of(path) == step and path != final):
                path.unlink()
        return final

    def list_checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first; of two of one step the one written first."""
        found = [path for path in self.checkpoints.glob("step-*.pt") if _CHECKPOINT.fullmatch(path.name)]
        return sorted(found, key=lambda path: (step_of(path), path.stat().st_mtime_ns))

    def newest_checkpoint(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose content fits its checksum; damaged ones are told of and skipped."""
        for leftover in self.checkpoints.glob("writing-*.tmp"):
            leftover.unlink()
        for path in reversed(self.list_checkpoints()):
            if f"{checksum(path):08x}" == path.stem.rpartition("-")[2]:
                return path
            warn(f"checkpoint '{path}' is damaged and set aside; the one before is used")
            path.rename(path.with_suffix(".damaged"))
        return None


def resume_hint(path: Path) -> str:
    """How to go on with an unfinished run."""
    recipe, output = path / "recipe.yaml", shlex.quote(f"output={path}")
    try:
        trust = " trust=true" * any(True for _ in code_names(read_file(recipe)))
    except UserError:
        trust = ""
    return f"go on with: diffkd distill {shlex.quote(str(recipe))} {output} resume=true{trust}"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content; holds tensors and plain values, never code."""
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def step_of(path: Path) -> int:
    """How many optimizer steps a checkpoint was written after."""
    return int(path.stem.split("-")[1])


def _is_leftover(entry: Path) -> bool:
    """Whether an entry of a run folder says nothing: an empty folder of checkpoints, a lock, half a file."""
    if entry.name == "checkpoints" and entry.is_dir():
        return not any(entry.iterdir())
    return entry.name in (_LOCK, _HOLDER) or entry.suffix == ".tmp"


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights as separate tensors: safetensors takes no shared memory."""
    seen: set[int] = set()
    separate = {}
    for name, value in tensors.items():
        separate[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return separate
