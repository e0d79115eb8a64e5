"""How hard each loss pulls at the student, and weights that follow from it."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffkd.distiller import Distiller
from diffkd.errors import UserError
from diffkd.maths.losses import precise
from diffkd.recipe.schema import Recipe

if TYPE_CHECKING:
    from lightning.fabric import Fabric

SHARE = 1.0  # of a method with the weight `auto`: its gradient is as long as the supervised loss's
_EVERY_STEP = 10  # at the start; then one in ten, to the end of the first epoch or so many steps
_LAST = 500


def gradient_norms(
    losses: Mapping[str, Tensor], student: nn.Module, names: Iterable[str]
) -> dict[str, Tensor]:
    """Length of the gradient at the student's weights, by method or loss; `task` is the supervised losses.

    The losses' graph stays whole. A method that does not reach the student has 0.

    Args:
        losses: named losses `task.x`, `kd.output.kd`, each a scalar with its graph.
        student: the model.
        names: of `task`, methods, or single losses.
    """
    weights = [p for p in student.parameters() if p.requires_grad]
    found: dict[str, Tensor] = {}
    for name in names:
        own = [
            loss
            for key, loss in losses.items()
            if (key == name or key.startswith(f"{name}.")) and loss.requires_grad
        ]
        grads: Iterable[Tensor | None] = ()
        if own:
            total = torch.stack([loss.float() for loss in own]).sum()
            grads = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
        norms = [torch.linalg.vector_norm(precise(grad)) for grad in grads if grad is not None]
        zero = torch.zeros((), device=weights[0].device)
        found[name] = torch.linalg.vector_norm(torch.stack(norms)) if norms else zero
    return found


class Balance:
    """Sets the weights that the recipe leaves to measurement (`weight: auto`).

    A method's weight makes its gradient at the student as long as the supervised loss's. It is measured
    in the first ten steps and in every tenth to the end of the first epoch (at most 500 steps), averaged
    over these, and stays. It is part of the distiller's state, so that a resumed run has the same.

    Args:
        distiller: whose weights they are.
        recipe: the run.
        fabric: of the run; processes take the mean of their measurements.
        per_epoch: optimizer steps of an epoch.

    Raises:
        UserError: the run is compiled, or has no supervised loss to measure by.
    """

    def __init__(self, distiller: Distiller, recipe: Recipe, fabric: "Fabric", per_epoch: int) -> None:
        self.distiller, self.fabric = distiller, fabric
        self.names = distiller.automatic
        self.last = min(per_epoch, _LAST) if self.names else 0
        where = f"method.{next(iter(self.names), '')}.weight=auto"
        if self.names and recipe.trainer.compile:
            raise UserError(f"{where} cannot be measured with trainer.compile=true; give a number")
        if self.names and (recipe.task.weight == 0 or recipe.data.options.get("labels") == "none"):
            raise UserError(f"{where}: there is no supervised loss to measure by; give a number")

    def __call__(self, losses: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The losses with the weights as they are after this step's measurement.

        Args:
            losses: of the batch, weighted.
            step: optimizer steps done.
        """
        if step >= self.last or (step >= _EVERY_STEP and step % _EVERY_STEP):
            return losses
        norms = gradient_norms(losses, self.distiller.student, ("task", *self.names))
        count = step + 1 if step < _EVERY_STEP else _EVERY_STEP + step // _EVERY_STEP
        scaled = dict(losses)
        for name in self.names:
            weight = self.distiller.weight_of(name)
            assert isinstance(weight, Tensor)
            pull = torch.stack([norms["task"], norms[name]])
            supervised, own = self.fabric.all_reduce(pull, reduce_op="mean")
            # A method that does not pull yet (a warm-up) says nothing of its weight, nor does a batch
            # without labels.
            pulls = (own > 0) & (supervised > 0)
            found = torch.where(pulls, weight * SHARE * supervised / own.clamp(min=1e-20), weight)
            after = (weight.log() + (found.log() - weight.log()) / count).exp()
            for key in losses:
                if key.startswith(f"{name}."):
                    scaled[key] = losses[key] * (after / weight)
            self.distiller.set_measured(name, after)
        return scaled
