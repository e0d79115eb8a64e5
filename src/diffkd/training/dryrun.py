"""One training step tried before any work: what fails in training mode alone shows at once."""

import torch
from torch import nn

from diffkd.batch import Batch
from diffkd.errors import UserError, told
from diffkd.maths.randomness import random_state, set_random_state

_HINTS = {
    "more than 1 value per channel": "give every device 2 pictures or more (data.batch_size)",
    "'tuple'": "it gives a tuple in training; build it without further outputs",
    "'dict'": "it gives a dict in training, without an entry 'logits'",
    "does not require grad": "nothing in it can learn: it has no weights, or cuts its output off from them",
}


def try_step(step: nn.Module, sample: Batch, student: str) -> list[str]:
    """Runs one step forward and backward in training mode, and leaves no trace of it.

    Args:
        step: gives named losses of a batch; on the CPU.
        sample: as many pictures as a device gets, two at most.
        student: the model's name, for an error.

    Returns:
        Names of the weights that want a gradient and got none.

    Raises:
        UserError: the step cannot be run.
    """
    device = torch.device("cpu")
    buffers = [(buffer, buffer.clone()) for buffer in step.buffers()]
    modes, random = {module: module.training for module in step.modules()}, random_state(device)
    count = len(sample.images)
    step.train()
    try:
        # Rows of the test data may have no place among the training data's.
        losses = step(sample._replace(indices=torch.arange(count)))
        if not losses:
            raise UserError("there is no loss: neither a method nor labels to learn from")
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
        return [name for name, p in step.named_parameters() if p.requires_grad and p.grad is None]
    except UserError:
        raise
    except Exception as error:  # of a model, a method or a task of anybody's own
        raise UserError(_refusal(error, student, count)) from error
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, mode in modes.items():
            module.training = mode
        step.zero_grad(set_to_none=True)
        set_random_state(random, device)


def _refusal(error: Exception, student: str, count: int) -> str:
    hint = next((f"; {hint}" for words, hint in _HINTS.items() if words in str(error)), "")
    pictures = "1 picture" if count == 1 else f"{count} pictures"
    what = f"student '{student}': a training step on {pictures} fails"
    return f"{what}: {told(error)}{hint}"
