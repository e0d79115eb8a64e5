"""How good a model is: its answers for a whole split, counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffkd.assembly import Parts
from diffkd.batch import Batch
from diffkd.errors import UserError
from diffkd.pictures.loading import Loader
from diffkd.recipe.sides import Side
from diffkd.tasks.base import Figures, Task
from diffkd.training.devices import own_code

Look = Callable[[Batch, Any], None]  # is given a loader's batch and the answers for it


# Is told of the evaluation of the student that ships, and gives what looks on, so that nobody need ask again.
Witness = Callable[[Parts], Look | None]
_REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def evaluate(
    side: Side,
    task: Task,
    loader: Loader,
    reference: Side | None = None,
    show: Look | None = None,
    precision: str = "fp32",
) -> Figures:
    """The task's figures, 0 to 1, of a model over a whole split.

    Args:
        side: the model.
        task: computes the figures.
        loader: of the split.
        reference: the model whose answers stand for the labels where the pictures carry none.
        show: is given every batch with the answers for it.
        precision: of a run: `bf16` and `fp16` compute where the task's figures bear it.

    Raises:
        UserError: the pictures carry no labels, and there is no reference.
    """
    modes = [(s.model, s.model.training) for s in (side, reference) if s is not None]
    for model, _ in modes:
        model.eval()
    metrics = task.metrics().to(loader.device)
    if loader.world_size == 1:  # this process sees all there is: it waits for no other
        for metric in metrics.values(copy_state=False):
            metric.distributed_available_fn = bool
    reduced = _REDUCED.get(precision) if task.half else None
    for batch in loader.epoch():
        with torch.autocast(loader.device.type, reduced, enabled=reduced is not None):
            if batch.targets is None:
                if reference is None:
                    raise UserError("the test pictures carry no labels; there is no teacher to agree with")
                batch = batch._replace(targets=task.answers(reference.forward(task, batch)))
            with own_code(f"'{side.name}' on the test pictures"):
                answers = side.forward(task, batch)
        if reduced is not None and isinstance(answers, Tensor) and answers.is_floating_point():
            answers = answers.float()
        task.update(metrics, answers, batch)
        if show is not None:
            show(batch, answers)
    for model, training in modes:
        model.train(training)
    return Figures.of(metrics.compute())
