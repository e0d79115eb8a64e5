"""One batch through everything, and what it shows: shapes, costs, losses, who learns."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from diffkd.assembly import Parts, assemble, check_outputs
from diffkd.distiller import Distiller
from diffkd.errors import UserError, plain
from diffkd.maths.randomness import seed_everything
from diffkd.models.measure import SavedBytes
from diffkd.pictures.files import Pictures
from diffkd.pictures.held import classes_in, part_of, spread
from diffkd.recipe.schema import Recipe
from diffkd.report.summary import quantity, size
from diffkd.report.suspicion import suspicions
from diffkd.training.balance import gradient_norms
from diffkd.training.optim import parameter_groups

SEEN = 256  # test pictures that a teacher is judged by
FEW = 16  # pictures that a check runs; what a whole batch takes follows from them


def check_recipe(recipe: Recipe, *, decode: bool = False) -> None:
    """Builds the whole run, runs one training batch forward and backward, prints what happened.

    Args:
        recipe: the run.
        decode: decodes every picture whole; else their headers are read.

    Raises:
        UserError: the recipe cannot be run, or more pictures are unreadable than it puts up with.
    """
    seed_everything(recipe.seed)
    parts = assemble(recipe, with_teacher=bool(recipe.method))
    damaged = list(_unreadable(parts, decode))
    sample = parts.sample(2)
    check_outputs(parts, sample)
    distiller, warnings = parts.distiller(sample)
    step = parts.step(distiller)
    groups = parameter_groups(recipe.optimizer, step)  # PyTorch's optimizers take seconds to import
    parts.loader(parts.data.train, shuffle=True, workers=0)  # refuses a batch that there cannot be
    few = min(recipe.data.batch_size, FEW)
    batch = next(iter(parts.loader(parts.training, shuffle=True, batch_size=few, workers=0).epoch()))
    step.train()
    distiller.expect(0)  # no warm-up: what pulls later pulls now
    saved = SavedBytes()
    with saved:
        losses = step(batch)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
    pulls = {name: norm.item() for name, norm in _pulls(losses, distiller).items()}
    total.backward()  # type: ignore[no-untyped-call]
    console = Console(
        highlight=False, markup=False, soft_wrap=True, width=None if Console().is_terminal else 130
    )
    for note in chain(_notes(parts, warnings), damaged):
        console.print(plain(note))
    if distiller.pairs:
        console.print(_taps(distiller))
    console.print(_modules(parts, distiller, groups))
    console.print(_costs(parts))
    console.print(_losses(losses, total, pulls))
    activations = saved.total * recipe.data.batch_size // few
    console.print(_memory(step, recipe, activations))
    console.print(_shares(recipe), markup=False)
    _complain(distiller, console)
    whole = {name: pulls[name] for name in ("task", *distiller.methods)}
    for line in (*unequal(whole), *_suspected(parts)):
        console.print(line, markup=False)


def _suspected(parts: Parts) -> Iterator[str]:
    """Warnings about a teacher of class scores, from some test pictures of all classes."""
    wanted = parts.recipe.teacher
    if parts.teacher is None or wanted is None or parts.recipe.task.name != "classification":
        return
    if not parts.teacher_answers:
        return
    test = parts.data.test
    chosen = part_of(test, spread(classes_in(test), len(test), SEEN), training=False)
    sample = next(iter(parts.loader(chosen, shuffle=False, batch_size=len(chosen), workers=0).epoch()))
    with torch.no_grad():
        scores = parts.teacher.forward(parts.task, sample)
    # what is trained first cannot be right yet
    for line in suspicions(scores, None if wanted.weights is None or wanted.train else sample.targets):
        yield f"warning: {line}"


def _pulls(losses: dict[str, Tensor], distiller: Distiller) -> dict[str, Tensor]:
    """Length of the gradient at the student, by method and by loss; that of all supervised ones is `task`."""
    return gradient_norms(losses, distiller.student, ("task", *distiller.methods, *losses))


def unequal(pulls: Mapping[str, float]) -> Iterator[str]:
    """How hard each method pulls at the student beside the supervised loss, with a warning where that is odd.

    Args:
        pulls: length of the gradient by method, and of the supervised loss as `task`.

    >>> list(unequal({"task": 2.0, "kd": 3.0, "pkt": 1e-5}))
    ['pull at the student beside the supervised loss: kd 1.5, pkt 5e-06', 'warning: method pkt pulls at the \
student with 5e-06 of the supervised loss: next to nothing; raise its weight, or set method.pkt.weight=auto']
    """
    supervised = pulls.get("task", 0.0)
    shares = {name: pull / supervised for name, pull in pulls.items() if name != "task" and supervised > 0}
    if not shares:
        return
    told = ", ".join(f"{name} {share:.2g}" for name, share in shares.items())
    yield f"pull at the student beside the supervised loss: {told}"
    for name, share in shares.items():
        if not 0.01 <= share <= 10:
            what, way = ("next to nothing", "raise") if share < 0.01 else ("it drowns the labels", "lower")
            yield (
                f"warning: method {name} pulls at the student with {share:.2g} of the supervised loss: "
                f"{what}; {way} its weight, or set method.{name}.weight=auto"
            )


def _notes(parts: Parts, warnings: list[str]) -> list[str]:
    notes = list(parts.notes())
    teacher = parts.recipe.teacher
    if parts.teacher is not None and teacher is not None and teacher.weights is None:
        notes.append("teacher: fresh weights here (a check trains nothing)")
    return notes + [f"warning: {line}" for line in warnings]


def _unreadable(parts: Parts, decode: bool) -> Iterator[str]:
    """Pictures that cannot be read, before they stop a training.

    Raises:
        UserError: there are more than `data.max_corrupt` of a split.
    """
    splits = {"training": parts.data.train, "unlabelled": parts.data.unlabelled, "test": parts.data.test}
    for what, split in splits.items():
        found = split.unreadable(decoded=decode) if isinstance(split, Pictures) else []
        if not found or split is None:
            continue
        told = f"{len(found)} of {len(split)} {what} pictures are unreadable: {'; '.join(found[:5])}"
        told += f" and {len(found) - 5} more" if len(found) > 5 else ""
        if isinstance(split, Pictures) and len(found) > split.max_corrupt:
            raise UserError(f"{told}; mend or remove them, or skip them: data.max_corrupt={len(found)}")
        yield f"warning: {told}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        numeric = column in (
            "parameters",
            "MACs",
            "ms/image",
            "value",
            "at the student",
            "trained",
            "with gradient",
            "in optimizer",
        )
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return table


def _taps(distiller: Distiller) -> Table:
    table = _table(
        "taps, without the batch axis", "pair", "kind", "student layer", "shape", "teacher layer", "shape"
    )
    for pair in distiller.pairs:
        table.add_row(
            pair.name,
            "logits" if pair.is_logits else "feature",
            pair.student.layer or "output",
            str(pair.student.shape),
            pair.teacher.layer or "output",
            str(pair.teacher.shape),
        )
    return table


def _modules(parts: Parts, distiller: Distiller, groups: Sequence[Mapping[str, Any]]) -> Table:
    """Who is trained at all: the question that users of such tools ask most."""
    table = _table("who learns", "module", "parameters", "trained", "with gradient", "in optimizer")
    held = {id(p) for group in groups for p in group["params"]}
    rows: list[tuple[str, nn.Module]] = [("student", distiller.student)]
    for name, method in distiller.methods.items():
        rows += [(f"{name}: {key}", part) for key, part in _parts_of(method)]
    rows += [(f"{name} (frozen)", side.model) for name, side in parts.teachers.items()]
    for name, module in rows:
        weights = list(module.parameters())
        counts = (
            sum(p.numel() for p in weights),
            sum(p.numel() for p in weights if p.requires_grad),
            sum(p.numel() for p in weights if p.grad is not None),
            sum(p.numel() for p in weights if id(p) in held),
        )
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def _parts_of(method: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A method's trained parts by name; where it has one module per pair, the parts of each."""
    for name, child in method.named_children():
        if isinstance(child, nn.ModuleDict | nn.ModuleList):
            for key, item in child.named_children():
                inner = [(f"{key} {part}", sub) for part, sub in item.named_children()]
                yield from inner or [(f"{name} {key}", item)]
        elif any(True for _ in child.parameters()):
            yield name, child


def _costs(parts: Parts) -> Table:
    table = _table("what a model costs", "", "model", "parameters", "MACs", "ms/image", "size")
    for what, side in {**parts.teachers, "student": parts.student}.items():
        cost = parts.cost(side)
        numbers = f"{cost.parameters:,}", quantity(cost.macs), f"{cost.milliseconds:.2f}", size(cost.bytes)
        table.add_row(what, side.name, *numbers)
    return table


def _losses(losses: dict[str, Tensor], total: Tensor, pulls: Mapping[str, float]) -> Table:
    """What each loss is, and how long its gradient at the student is as a share of the supervised ones'."""
    table = _table("losses of the first batch, weighted", "loss", "value", "gradient", "at the student")
    for name, value in losses.items():
        share = f"{pulls[name] / pulls['task']:.2g}" if pulls["task"] > 0 else f"{pulls[name]:.2g} (norm)"
        table.add_row(name, f"{value.item():.6f}", "yes" if value.requires_grad else "NO", share)
    table.add_row("total", f"{total.item():.6f}", "yes", "")
    return table


def _memory(step: nn.Module, recipe: Recipe, saved: int) -> str:
    weights = sum(p.numel() * p.element_size() for p in step.parameters())
    adam = recipe.optimizer.name == "adamw"  # two moments; of the others one, where there is momentum
    slots = 2 if adam else int(getattr(recipe.optimizer, "momentum", 0) > 0)
    return (
        f"memory of a training step: weights {size(weights)}, gradients {size(weights)}, "
        f"optimizer {size(slots * weights)}, "
        f"activations {size(saved)} for {recipe.data.batch_size} images"
    )


def _shares(recipe: Recipe) -> str:
    """How many of a batch's pictures one device gets."""
    total, devices, nodes = recipe.data.batch_size, recipe.trainer.devices, recipe.trainer.num_nodes
    count = nodes * (devices if isinstance(devices, int) else max(torch.cuda.device_count(), 1))
    return f"batch of {total} on {count} device(s): {total // count} pictures on each"


def _complain(distiller: Distiller, console: Console) -> None:
    """Names what ought to learn and does not."""
    silent = [name for name, p in distiller.named_parameters() if p.requires_grad and p.grad is None]
    if silent:
        shown = ", ".join(silent[:3]) + (", ..." if len(silent) > 3 else "")
        console.print(f"warning: no gradient reaches {len(silent)} weights: {shown}")
    grads = [p.grad for p in distiller.student.parameters() if p.grad is not None]
    zero = sum(not grad.any() for grad in grads)
    if zero:
        console.print(
            f"note: the gradients of {zero} of the student's {len(grads)} tensors are zero at this first "
            "step, as behind layers that start at zero (the last of a residual block, say)"
        )
