"""How long a run is, and where in it a step stands."""

from dataclasses import dataclass

from diffkd.recipe.training import TrainerRecipe

EVALUATIONS = 20  # of a run that is given in steps, where nothing else is said


@dataclass(frozen=True)
class Length:
    """A run's length in optimizer steps, whether the recipe gives epochs or steps.

    Attributes:
        per_epoch: steps of one epoch, the same on any number of processes.
        total: steps of the schedule.
        last: the step after which the run ends: `total`, or fewer where it is cut for a trial.
        every: steps from one evaluation to the next.
        unit: what the recipe counts in, `epoch` or `step`: the axis of curves.

    >>> length = Length.of(TrainerRecipe(steps=100), per_epoch=40)
    >>> length.progress(50), length.epochs(50), length.every
    (0.5, 1.25, 5)
    >>> [step for step in range(1, 101) if Length.of(TrainerRecipe(epochs=2), 50).evaluates(step)]
    [50, 100]
    """

    per_epoch: int
    total: int
    last: int
    every: int
    unit: str

    @classmethod
    def of(cls, recipe: TrainerRecipe, per_epoch: int) -> "Length":
        """The length that a recipe asks for, given the optimizer steps of an epoch."""
        total = recipe.steps or per_epoch * (recipe.epochs or 0)
        usual = per_epoch if recipe.steps is None else max(total // EVALUATIONS, 1)
        every = recipe.eval_every or (recipe.eval_epochs or 0) * per_epoch or usual
        unit = "epoch" if recipe.steps is None else "step"
        return cls(per_epoch, total, min(total, recipe.max_steps or total), every, unit)

    def progress(self, step: int) -> float:
        """The share of the run that is done after `step` steps, 0 to 1."""
        return step / self.total

    def epochs(self, step: int) -> float:
        """`step` steps in epochs, with a fraction within an epoch."""
        return step / self.per_epoch

    def told_epochs(self, step: int) -> float:
        """The same for a table: a whole number where it is one."""
        whole, rest = divmod(step, self.per_epoch)
        return round(step / self.per_epoch, 4) if rest else whole

    def evaluates(self, step: int) -> bool:
        """Whether the student is evaluated after `step` steps."""
        return step % self.every == 0 or step == self.last

    def told(self, step: int) -> str:
        """Where the run is after `step` steps, in a few words: of epochs, in that of the last step.

        >>> length = Length(5, 20, 20, 5, "epoch")
        >>> length.told(0), length.told(5), length.told(6)
        ('epoch 1/4', 'epoch 1/4', 'epoch 2/4')
        """
        if self.unit == "step":
            return f"step {step}/{self.total}"
        return f"epoch {max(step - 1, 0) // self.per_epoch + 1}/{self.total // self.per_epoch}"
