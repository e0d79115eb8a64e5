"""The teacher of a run: made once and kept, made again where it is damaged; how good it is, measured once."""

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from lightning.fabric import Fabric

from diffkd.assembly import Parts
from diffkd.errors import UserError
from diffkd.pictures.kept import cache_folder
from diffkd.recipe.schema import Recipe, load
from diffkd.runs.console import Reporter
from diffkd.runs.content import UNLABELLED, combined
from diffkd.runs.disk import write_atomically
from diffkd.runs.folder import RunFolder
from diffkd.runs.identity import Identity, changed, difference, identify, short_name
from diffkd.runs.places import check_cache, check_folder, check_identity
from diffkd.tasks.base import Figures, near_chance
from diffkd.training.devices import on_first
from diffkd.training.interrupt import InterruptedRunError

_WAIT = 5.0  # seconds between two looks at whether another run has made the teacher


def make_teacher(
    name: str,
    parts: Parts,
    fabric: Fabric,
    reporter: Reporter,
    train: Callable[[Recipe, Reporter], RunFolder],
) -> RunFolder:
    """The run that trained a teacher of the recipe: found in the cache, or run now and kept there.

    Args:
        name: the teacher's.
        parts: the run's, whose data and teacher's weights, as they were found, determine the teacher too.
        fabric: launched.
        reporter: says what happens.
        train: runs the teacher's recipe.

    Raises:
        UserError: the cache folder cannot be used.
    """
    wanted = parts.recipe.teacher_recipe(name)
    start = {"weights": parts.teachers[name].weights}
    wanted = wanted.model_copy(update={"student": wanted.student.model_copy(update=start)})
    content = {name: digest for name, digest in parts.content.items() if name != UNLABELLED}
    identity = identify(wanted, content) if fabric.is_global_zero else {}
    place = Path(fabric.broadcast(str(_place(wanted, identity))))
    wanted = wanted.model_copy(update={"output": str(place), "resume": True})
    folder, model = RunFolder(place), wanted.student.model
    if fabric.broadcast(_serves(folder, wanted, identity, reporter)):
        reporter.note(f"teacher: {model} from {place}")
        return folder
    on_first(fabric, lambda: check_cache(place))
    reporter.note(f"teacher: training {model} once, kept in {place}")
    if fabric.is_global_zero and not folder.exists():
        _say_why(place, wanted, identity, reporter)
    with ExitStack() as held:
        _take_turns(held, place, fabric, reporter)
        if fabric.broadcast(_serves(folder, wanted, identity, reporter)):  # by another run, meanwhile
            return folder
        try:
            return train(wanted, reporter.silent("teacher"))
        except InterruptedRunError as error:
            line = "stopped while the teacher was trained; saved; the same command goes on"
            raise InterruptedRunError(line, error.signal) from error


def _place(wanted: Recipe, identity: Identity) -> Path:
    name = re.sub(r"[^\w.-]+", "-", wanted.student.model)
    return cache_folder() / "teachers" / f"{name}-{short_name(identity)}"


def _serves(folder: RunFolder, wanted: Recipe, identity: Identity, reporter: Reporter) -> bool:
    """Whether a whole teacher is there; one that is damaged, or cannot be gone on with, is removed."""
    if not identity or not folder.exists():  # not the first process, or nothing there
        return False
    try:
        check_folder(folder, wanted)
        check_identity(folder, identity)
        if not folder.finished:
            return False
        folder.read_summary()
        damage = folder.damage()
        if damage is None and not folder.student_file.is_file():
            damage = f"'{folder.student_file}' is missing"
    except UserError as error:
        damage = str(error)
    if damage is not None:
        reporter.note(f"teacher: {damage}; it is made again")
        shutil.rmtree(folder.path, ignore_errors=True)
        if folder.path.is_file():
            folder.path.unlink()
    return damage is None


def _say_why(place: Path, wanted: Recipe, identity: Identity, reporter: Reporter) -> None:
    """Says in what the newest teacher of this model differs from the one that is wanted."""
    stem = place.name.rpartition("-")[0]
    others = [
        p for p in place.parent.glob(f"{stem}-*/identity.json") if p.parent.name.rpartition("-")[0] == stem
    ]
    for other in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)[:1]:
        folder = RunFolder(other.parent)
        try:
            recipe = difference(load(str(folder.recipe_file), trust=True), wanted)
            data = changed(folder.read_identity(), identity)
        except UserError:
            continue
        if recipe or data:
            why = f"is another: {recipe}" if recipe else f"was made on other {data}"
            reporter.note(f"teacher: the one in {folder.path} {why}")


def _take_turns(held: ExitStack, place: Path, fabric: Fabric, reporter: Reporter) -> None:
    """Waits until no other run makes this teacher; all processes look together: none is left alone."""
    lock = FileLock(f"{place}.lock")
    told = False
    while True:
        taken = False
        if fabric.is_global_zero:
            try:
                lock.acquire(timeout=_WAIT)
                held.callback(lock.release)
                taken = True
            except Timeout:
                if not told:
                    reporter.note("teacher: another run is making it; waiting")
                told = True
        if fabric.broadcast(taken):
            return


def teacher_figures(
    parts: Parts, name: str, fabric: Fabric, measure: Callable[[], Figures]
) -> dict[str, float]:
    """How good a teacher is on the test data: as it was measured before, or measured now and kept.

    Args:
        parts: of the run.
        name: the teacher's.
        fabric: launched.
        measure: evaluates the teacher, in all processes.
    """
    place = cache_folder() / "figures" / f"{_judged(parts, name)}.json" if fabric.is_global_zero else None
    known = fabric.broadcast(None if place is None else _read_figures(place))
    if known is not None:
        return known
    figures = dict(measure().scalars)
    if place is not None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, lambda partial: partial.write_text(json.dumps(figures)))
        except (OSError, UserError):
            pass  # a cache that cannot be written is no reason to stop: it is measured again
    return figures


def untrained(parts: Parts, name: str, figures: Mapping[str, float]) -> Iterator[str]:
    """A warning where a teacher's figure is near chance, with the way out that its recipe leaves.

    Args:
        parts: of the run.
        name: the teacher's.
        figures: of `teacher_figures`.
    """
    teacher, task, score = parts.teachers[name], parts.task, figures[parts.task.metric]
    if task.chance is None or not near_chance(score, task.chance, len(parts.data.test)):
        return
    wanted = parts.recipe.every_teacher[name]
    key = "teacher" if name == "teacher" else f"teachers.{name}"
    if wanted.train is not None:
        length = parts.recipe.teacher_recipe(name).trainer
        took = f"steps={length.steps}" if length.steps is not None else f"epochs={length.epochs}"
        way = f"it was trained with {key}.train.{took}: train it longer"
    else:
        way = f"let it learn these classes ({key}.train.epochs=10), or give {'other ' * bool(wanted.weights)}"
        way += f"{key}.weights"
    yield (
        f"teacher '{teacher.name}' looks untrained: {task.metric_label} {100 * score:.2f} % is near chance "
        f"({100 * task.chance:.2f} %); {way}"
    )


def _read_figures(place: Path) -> dict[str, float] | None:
    try:
        found = json.loads(place.read_bytes())
        return {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _judged(parts: Parts, name: str) -> str:
    """A short name of all that the teacher's figures depend on, the tensors of the model themselves too."""
    teacher, recipe = parts.teachers[name], parts.recipe
    identity = parts.identity
    tensors = [
        f"{name} {zlib.crc32(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)}"
        for name, value in teacher.model.state_dict().items()
        if isinstance(value, torch.Tensor) and value.numel()
    ]
    seen = [
        teacher.prepare.mean.flatten().tolist(),
        teacher.prepare.std.flatten().tolist(),
        teacher.prepare.size,
    ]
    told = [teacher.name, repr(recipe.every_teacher[name].options), repr(seen)]
    told.append(recipe.trainer.precision)
    told += [
        recipe.task.name,
        repr(recipe.task.options),
        recipe.data.name,
        repr(sorted(recipe.data.options.items())),
    ]
    told += [f"{k} {v}" for k, v in identity["data"].items() if not k.startswith("training")]
    return combined([*told, repr(identity["code"]), repr(identity["versions"]), *tensors])
