"""A finished run's student, measured again: its figures, and where it errs."""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from diffkd import __version__
from diffkd.assembly import Parts, assemble, check_outputs
from diffkd.data.base import Data
from diffkd.errors import UserError
from diffkd.maths.randomness import cpu_threads, seed_everything
from diffkd.pictures.files import Part, Pictures
from diffkd.pictures.held import part_of, says
from diffkd.pictures.loading import Streamed
from diffkd.pictures.unlabelled import joined
from diffkd.recipe.schema import Recipe, load
from diffkd.recipe.sides import Side
from diffkd.report.faults.base import Account, name_of, write_table
from diffkd.report.faults.classification import ClassAccount
from diffkd.report.faults.detection import BoxAccount
from diffkd.report.faults.segmentation import MapAccount
from diffkd.report.faults.sheet import contact_sheet
from diffkd.report.summary import percent
from diffkd.runs.console import Reporter
from diffkd.runs.disk import saying_where, write_atomically
from diffkd.runs.folder import RunFolder
from diffkd.tasks.base import Figures, Task
from diffkd.tasks.classification import Classification
from diffkd.tasks.detection import Detection
from diffkd.tasks.segmentation import Segmentation
from diffkd.training.devices import as_channels_last
from diffkd.training.evaluation import Look, evaluate
from diffkd.use.student import Student, load_student
from diffkd.use.trained import as_trained

FOLDER = "evaluation"  # in the run folder
_LONGEST = 120  # characters of a folder's name
_MOST = 2000  # classes, above which only the figures are kept
SplitName = Literal["test", "val", "train"]
_KEYS = ("data.", "data=", "task.", "trainer.threads=", "trust=")


@dataclass(frozen=True)
class Evaluation:
    """A student's figures on a data set.

    Attributes:
        summary: of the run.
        words: the overrides that chose the data.
        parts: data and task.
        recorded: figures that the run wrote down of this student, where they are of this data set.
        figures: of 0 to 1.
        account: where it errs; None for a task of one's own.
        split: of the data.
        which: of the run's students.
    """

    summary: dict[str, Any]
    words: tuple[str, ...]
    parts: Parts
    recorded: Mapping[str, float]
    figures: Figures
    account: Account | None
    split: str = "test"
    which: str = "last"

    @property
    def scalars(self) -> dict[str, float]:
        """All single figures."""
        return dict(self.figures.scalars) | (self.account.scalars() if self.account else {})

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain values."""
        task, test = self.parts.task, self.parts.data.test
        told: dict[str, Any] = {
            "diffkd": __version__,
            "data": self.parts.data.summary,
            "overrides": list(self.words),
            "split": self.split,
            "student": self.which,
            "pictures": len(test),
            "metric": task.metric,
            "metric_label": self.summary["metric_label"],
            "figures": self.scalars,
            "recorded": dict(self.recorded),
        }
        if self.account is not None:
            told |= self.account.tables(self.figures)
            told["worst"] = [
                {"index": worst.index, "picture": name_of(test, worst.index), **worst.facts}
                for worst in self.account.sheet()
            ]
        return told


def evaluate_run(path: str, words: Sequence[str] = ()) -> Iterator[str]:
    """The student's figures on its test data, or on other data, one line each, in the run's precision.

    Where it errs is written to `evaluation/` in the run folder, and shown on the run's page:
    `figures.json` with all figures, `classes.csv`, the confusion matrix as `confusion.csv` and
    `confusion.png`, `reliability.png` (classification), and `worst.png`, the most confident errors or the
    worst pictures. On other data, of another split or of the best epoch's student it goes to a folder of
    its own beside that, `evaluation-photos/`, which the page links to.

    Args:
        path: a run folder.
        words: `data.root=...` and other `data.` and `task.` keys, `split=train` or `val`, `which=best`,
            `output=FOLDER`, `trainer.threads`, and `trust=true` for a run of code that the run folder names.

    Raises:
        UserError: the folder holds no finished run, its student is damaged, or the data do not fit it.
    """
    from diffkd.report.run_page import write_run_page

    folder, overrides = RunFolder(path), []
    told = {"output": "", "which": "last", "split": "test"}
    for word in words:
        key, _, value = word.partition("=")
        if key in told:
            told[key] = value
        elif word.startswith(_KEYS):
            overrides.append(word)
        else:
            raise UserError(
                "evaluate takes data.KEY=..., task.KEY=..., trainer.threads=N, split=train, which=best, "
                f"output=FOLDER and trust=true, not '{word}'"
            )
    which, split = told["which"], told["split"]
    found = measure(folder, overrides, trust="trust=true" in overrides, which=which, split=split)  # type: ignore[arg-type]
    if split != "test":
        yield found.parts.data.notes[-1]
    for name, figure in found.figures.scalars.items():
        yield f"{name} {percent(figure)}{_beside(figure, found.recorded.get(name))}"
    if any(word.startswith(("data.root", "data=")) for word in overrides):
        yield f"looked at: {len(found.parts.data.test):,} pictures"
        yield from found.parts.data.notes
    place = Path(told["output"]) if told["output"] else evaluation_folder(folder, found)
    write_evaluation(found, place)
    yield f"where it errs: {place}"
    if not told["output"]:
        yield f"page: {write_run_page(folder)}"


def _beside(figure: float, recorded: float | None) -> str:
    """What a run wrote down of a figure, beside what it is now.

    >>> _beside(0.5, 0.5), _beside(0.5, 0.25), _beside(0.5, 0.5000001), _beside(0.5, None)
    (' (as recorded)', ' (recorded: 25.00 %)', ' (recorded: 50.00 %, 1e-07 away)', '')
    """
    if recorded is None or figure == recorded:
        return "" if recorded is None else " (as recorded)"
    away = f", {abs(figure - recorded):.0e} away" * (percent(figure) == percent(recorded))
    return f" (recorded: {percent(recorded)}{away})"


def measure(
    folder: RunFolder,
    words: Sequence[str] = (),
    *,
    trust: bool = False,
    which: Literal["last", "best"] = "last",
    split: SplitName = "test",
) -> Evaluation:
    """Lets a finished run's student answer for the test data, and keeps an account of its errors.

    Args:
        folder: of the run.
        words: overrides of its recipe that choose the data.
        trust: runs the code that the run folder names.
        which: of its students.
        split: of its data: "val" is what was held out for choosing, "train" is seen as in testing.

    Raises:
        UserError: as in `evaluate_run`, or there is no such split.
    """
    if split not in get_args(SplitName):
        raise UserError(f"split={split}: needs test, val or train")
    summary = folder.read_summary()
    damage = folder.damage()
    if damage is not None:
        raise UserError(damage)
    recipe = load(str(folder.recipe_file), words, trust=trust)
    seed_everything(recipe.seed)  # a teacher with fresh weights is the same again
    student = load_student(folder.path, trust=trust, which=which)
    side = Side(student.config["model"], student.model, student.prepare)
    weights = summary["teacher"]["weights"] if summary["teacher"] else None
    parts = assemble(as_trained(recipe, folder, weights), with_teacher=summary["agreement"], student=side)
    _check_classes(parts, student.config.get("class_names") or [], folder)
    if any(word.startswith(("data=", "data.name=")) for word in words):
        side.prepare = _as_trained(student, parts)
    data = _on(parts.data, split)
    other = any(key in ("data", "data.name", "data.root") for key, _ in _changes(words))
    if split == "test" and other and data.test_held_out and not _is_the_runs(parts, folder):
        data = _whole(data)
    parts = replace(parts, data=_at_levels(data, student.view.levels))
    check_outputs(parts, parts.sample(1))
    device = torch.device(summary["device"] if torch.cuda.is_available() else "cpu")
    loader = parts.loader(parts.data.test, shuffle=False, device=device)
    account = account_of(parts.task, student.class_names)
    teacher = parts.teacher and parts.teacher.to(device)
    if recipe.trainer.channels_last:
        as_channels_last(*(held.model for held in (side, teacher) if held is not None))
    with cpu_threads(recipe.trainer.threads), _bar(recipe, len(loader)) as bar:

        def show(batch: Any, answers: Any) -> None:
            if account is not None:
                account.add(batch, answers)
            bar.step(1, len(batch.images))
            bar.show("", {})

        figures = evaluate(side.to(device), parts.task, loader, teacher, show, recipe.trainer.precision)
    loader.close()
    own = split == "test" and not _changes(words)
    recorded = student.config.get("figures", {}) if own else {}
    return Evaluation(summary, tuple(words), parts, recorded, figures, account, split, which)


class LastEvaluation:
    """Keeps an account of a run's last evaluation while it goes on, so that the student is asked once.

    There is none of a run that was finished before, or that `trainer.patience` ended.
    """

    def __init__(self) -> None:
        self._parts: Parts | None = None
        self._account: Account | None = None

    def __call__(self, parts: Parts) -> Look | None:
        """The evaluation begins; see `diffkd.training.evaluation.Witness`."""
        names = parts.data.class_names or tuple(map(str, range(parts.data.num_classes or 0)))
        self._parts, self._account = parts, account_of(parts.task, names)
        return None if self._account is None else self._account.add

    def found(self, folder: RunFolder) -> Evaluation | None:
        """What came of it, once the run has finished."""
        if self._parts is None:
            return None
        summary = folder.read_summary()
        figures = Figures(summary["last"], summary["arrays"])
        return Evaluation(summary, (), self._parts, figures.scalars, figures, self._account)


def evaluation_folder(folder: RunFolder, found: Evaluation) -> Path:
    """Where an account goes: one folder for the run's own test data, others for what else was looked at."""
    changes = dict(_changes(found.words))
    root = changes.pop("data.root", "")
    named = [changes.pop(key) for key in ("data.name", "data") if key in changes]
    others = [f"{key.partition('.')[2]}-{value}" for key, value in changes.items()]
    told = ["best"] if found.which == "best" else []
    told += [Path(root).name] if root else named[:1]
    told += [*others, found.split] if found.split != "test" else others
    return folder.path / re.sub(r"[^\w.-]+", "-", "-".join([FOLDER, *told]))[:_LONGEST].strip("-")


def _changes(words: Sequence[str]) -> list[tuple[str, str]]:
    """Keys and values of the overrides that make the data or the task others than the run's own."""
    pairs = [(key, value) for key, _, value in (word.partition("=") for word in words)]
    same = ("data.workers", "data.eval_batch_size", "trainer.threads", "trust")
    return [pair for pair in pairs if pair[0] not in same]


def _at_levels(data: Data, levels: tuple[int, int] | None) -> Data:
    """The data whose 16-bit pictures become black and white where they did in training."""
    if levels is None or not isinstance(data.test, Pictures):
        return data
    test = copy.copy(data.test)
    test.levels = levels
    return replace(data, test=test)


def _on(data: Data, split: SplitName) -> Data:
    """The data with another split in the test split's place."""
    if split == "test":
        return data
    if split == "val":
        if data.val is None:
            raise UserError("split=val: the run held no validation samples out (data.val_fraction)")
        return data.on_validation()
    seen = part_of(data.train, np.arange(len(data.train)), training=False)
    how = "as in testing" if says(data.train, "part") else "as in training, for they know no other way"
    note = f"{len(data.train):,} training samples, seen {how}"
    return replace(data, test=seen, notes=(*data.notes, note))


def _is_the_runs(parts: Parts, folder: RunFolder) -> bool:
    """Whether the data are the run's own, in another place: then most of them were trained on."""
    there = folder.read_identity().get("data", {})
    return any(parts.content[name] == there.get(name) for name in ("training pictures", "test pictures"))


def _whole(data: Data) -> Data:
    """All pictures of data that have no test split."""
    train, test = data.train, data.test
    if isinstance(test, Streamed):
        return data
    if isinstance(test, Pictures) and isinstance(test.source, Part):
        test = test.whole()  # its pictures keep their names
    else:
        test = joined(test, part_of(train, np.arange(len(train)), training=False))
    notes = tuple(note for note in data.notes if "no test split" not in note)
    note = f"no test split: all {len(test):,} pictures are looked at"
    return replace(data, test=test, test_held_out=False, notes=(*notes, note))


def write_evaluation(found: Evaluation, place: Path) -> None:
    """Writes all that an evaluation found into a folder.

    Raises:
        UserError: it cannot be written to.
    """
    text = json.dumps(found.as_dict(), indent=2, ensure_ascii=False) + "\n"
    with saying_where(place):
        place.mkdir(parents=True, exist_ok=True)
        account, sheet = found.account, place / "worst.png"
        if account is not None:
            for name, rows in account.tables(found.figures).items():
                write_table(place / f"{name}.csv", rows)
            account.draw(place, found.figures)
            worst = account.sheet()
            if worst:
                contact_sheet([one.row for one in worst], sheet)
            else:
                sheet.unlink(missing_ok=True)
        write_atomically(place / "figures.json", lambda partial: partial.write_text(text, encoding="utf-8"))


class _AsTrained(nn.Module):
    """Pictures of another kind of data at the size and in the channels of those that the student knows."""

    def __init__(self, prepare: nn.Module, shape: Sequence[int], resizes: bool) -> None:
        super().__init__()
        self.prepare, self.channels = prepare, shape[0]
        self.size = (shape[1], shape[2]) if resizes else None

    def forward(self, images: Any) -> Any:
        """`(B, C, H, W)` or a list of `(C, H, W)`, as the student takes them."""
        if isinstance(images, list):
            return self.prepare([self._one(image[None])[0] for image in images])
        return self.prepare(self._one(images))

    def _one(self, images: Tensor) -> Tensor:
        if self.channels == 1 and images.shape[1] == 3:
            images = functional.rgb_to_grayscale(images)
        if self.size is not None and images.shape[-2:] != self.size:
            images = functional.resize(images, list(self.size), antialias=True)
        return images


def _as_trained(student: Student, parts: Parts) -> Any:
    shape = student.config["image_shape"]
    if parts.data.image_shape == tuple(shape):
        return student.prepare
    return _AsTrained(student.prepare, shape, parts.task.resizes)


def _bar(recipe: Recipe, batches: int) -> Any:
    return Reporter(progress=recipe.trainer.progress, what="evaluating").bar(batches)


def account_of(task: Task, names: Sequence[str]) -> Account | None:
    """An empty account of a task's errors; None of one's own task, or of several classes a picture."""
    if not 0 < len(names) <= _MOST:
        return None
    if isinstance(task, Classification):
        return None if task.independent else ClassAccount(names)
    if isinstance(task, Segmentation):
        return MapAccount(names, task)
    return BoxAccount(names) if isinstance(task, Detection) else None


def _check_classes(parts: Parts, known: Sequence[str], folder: RunFolder) -> None:
    """Refuses data whose classes are others, or stand in another order, than those it was trained on."""
    names = list(parts.data.class_names)
    if known and names and list(known) != names:
        first = next((pair for pair in zip(known, names, strict=False) if pair[0] != pair[1]), None)
        why = f"'{first[1]}' stands where '{first[0]}' stood" if first else f"{len(names)} for {len(known)}"
        raise UserError(f"the classes of the data are not those of '{folder.path}': {why}")
