"""What a recipe says of a model: the student, a teacher, and how a teacher is made."""

from typing import Annotated

from pydantic import Field, model_validator

from diffkd.recipe.base import Arguments, Count, Positive, Section
from diffkd.recipe.training import OptimizerRecipe, ScheduleRecipe


class ModelRecipe(Section):
    """A model, its weights, and its way of seeing pictures where it differs from the data's.

    Attributes:
        model: `source/name` (`diffkd list models`), or a function or class by `file.py:name`.
        weights: a file, a run folder, or the name of published weights (`pretrained`, `IMAGENET1K_V1`);
            `available` takes the published ones where they can be fetched, and says which it took.
        weights_by_order: takes the weights' tensors in their order, whatever their names.
        options: further arguments of the model, such as `{drop_path_rate: 0.2}`.
        mean, std: on the scale 0 to 1; size: the pixels that pictures are resized to.
        freeze: paths of layers that are not trained: out of the optimizer, and in evaluation mode.
        freeze_norm: whether batch normalisation keeps its statistics and weights as they come.
    """

    model: str
    weights: str | None = None
    weights_by_order: bool = False
    options: Arguments = Field(default_factory=dict)
    mean: list[float] | None = None
    std: list[Positive] | None = None
    size: Count | None = None
    freeze: list[str] = Field(default_factory=list)
    freeze_norm: bool = False


class TeacherTraining(Section):
    """How a teacher is made, from its weights if it has some; what is not said is as in the student's run.

    Attributes:
        epochs, steps: how long it is trained, one of the two.
        batch_size: pictures of a batch, on all devices together.
        optimizer: sections of its own, in place of the student's.
        schedule: as `optimizer`.
        seed: of its first weights and its order of pictures; a teacher is made once for each seed.
    """

    epochs: Count | None = None
    steps: Count | None = None
    batch_size: Count | None = None
    optimizer: OptimizerRecipe | None = Field(default=None, discriminator="name")
    schedule: ScheduleRecipe | None = Field(default=None, discriminator="name")
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_length(self) -> "TeacherTraining":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("needs either epochs or steps")
        return self


class TeacherRecipe(ModelRecipe):
    """The teacher: its weights, or how it is made.

    Attributes:
        train: how it is trained where it does not exist yet; null takes its weights as they are.
        share: how much it counts beside further teachers; all shares together make the methods' weights.
    """

    train: TeacherTraining | None = None
    share: Positive = 1.0
