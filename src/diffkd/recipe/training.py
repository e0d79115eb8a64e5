"""What a recipe says of training: optimizer, schedule, the loop."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from diffkd.recipe.base import Count, NotNegative, Positive, Section, Share


class Optimizer(Section):
    """What all optimizers share.

    Attributes:
        name: of the optimizer.
        lr: the learning rate after warm-up.
        lr_batch: pictures of a step that `lr` is meant for: it is scaled by how many a step of the run has,
            on all devices and over `trainer.accumulate` batches; as it is if not given.
        weight_decay: strength of the pull of weights towards 0.
        no_decay: which weights `weight_decay` leaves alone. `auto`: those of norms, biases, all of one axis,
            tables of positions, and what a model's `no_weight_decay()` names; `none`: it decays
            everything; a list: layers by path, and `auto` among them for those too.
        lr_factors: by path, what the learning rate of a layer and all in it is multiplied by; the
            longest path counts. The student's layers have their own paths, a method's begin with
            `method.`
    """

    lr: Positive
    lr_batch: Count | None = None
    weight_decay: NotNegative = 0.0
    no_decay: Literal["auto", "none"] | list[str] = "auto"
    lr_factors: dict[str, Positive] = Field(default_factory=dict)


class Sgd(Optimizer):
    """Stochastic gradient descent with momentum.

    Attributes:
        momentum: share of the last step that goes into the next.
        nesterov: whether the gradient is taken where the momentum leads.
    """

    name: Literal["sgd"] = "sgd"
    lr: Positive = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False


class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    Attributes:
        betas: decay of the averages of gradients and of their squares.
    """

    name: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.01
    betas: list[Share] = Field([0.9, 0.999], min_length=2, max_length=2)


class RmspropTf(Optimizer):
    """RMSProp as TensorFlow has it: epsilon within the root, as the mobile networks are trained.

    Attributes:
        momentum: share of the last step that goes into the next.
        alpha: decay of the average of squared gradients.
        eps: keeps the root away from 0.
    """

    name: Literal["rmsproptf"] = "rmsproptf"
    lr: Positive = 0.048
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.9
    eps: Positive = 1e-3


class Schedule(Section):
    """What all schedules share: so many epochs, or optimizer steps, that rise linearly from zero.

    Attributes:
        name: of the schedule.
        warmup_epochs, warmup_steps: how long the rate rises, in one of the two.
    """

    warmup_epochs: NotNegative = 0.0
    warmup_steps: Count | None = None

    @model_validator(mode="after")
    def _one_warmup(self) -> "Schedule":
        if self.warmup_epochs and self.warmup_steps is not None:
            raise ValueError("needs either warmup_epochs or warmup_steps")
        return self


class ConstantSchedule(Schedule):
    """The same learning rate throughout."""

    name: Literal["constant"] = "constant"


class StepSchedule(Schedule):
    """Multiplies the learning rate by `factor` at each milestone, or every so often.

    Attributes:
        milestones: when the rate falls, in `unit`.
        every: from one fall to the next, in `unit`.
        unit: of `milestones` and `every`: epochs, optimizer steps, or shares of the whole run.
        factor: what the rate is multiplied by at each fall.

    Raises:
        ValueError: both or neither of `milestones` and `every` are given.
    """

    name: Literal["step"] = "step"
    milestones: list[Positive] = Field(default_factory=list)
    every: Positive | None = None
    unit: Literal["epochs", "steps", "share"] = "epochs"
    factor: Positive = 0.1

    @model_validator(mode="after")
    def _one_way(self) -> "StepSchedule":
        if bool(self.milestones) == (self.every is not None):
            raise ValueError("needs either milestones (a list of epochs, or of the unit) or every")
        return self


class CosineSchedule(Schedule):
    """Half a cosine from 1 down to `final_factor`.

    Attributes:
        final_factor: the last rate, as a share of the first.
    """

    name: Literal["cosine"] = "cosine"
    final_factor: Share = 0.0


class PolySchedule(Schedule):
    """`(1 - t) ** power` over the run.

    Attributes:
        power: how steeply the rate falls: 1 is a straight line.
    """

    name: Literal["poly"] = "poly"
    power: Positive = 0.9


OptimizerRecipe = Sgd | AdamW | RmspropTf
ScheduleRecipe = ConstantSchedule | StepSchedule | CosineSchedule | PolySchedule


class TrainerRecipe(Section):
    """The loop.

    Attributes:
        epochs, steps: how long to train, one of the two; steps are optimizer steps. 60 epochs where neither
            is said.
        eval_every, eval_epochs: optimizer steps, or epochs, from one evaluation to the next, each with a row
            of history and a checkpoint; the end of the run is always one. Where neither is said: every
            epoch, or 20 times in a run that is given in steps.
        precision: of the models' passes: 32 bits, or 16 by autocast; weights and losses keep 32.
        accelerator: where it runs; `auto` takes a GPU where there is one.
        devices: how many, or all.
        num_nodes: machines, each with so many devices.
        strategy: how several devices work together; `auto` takes `ddp` where there are several.
        clip_grad_norm: longest gradient, all weights together; null does not clip.
        accumulate: batches whose gradients make one optimizer step.
        channels_last: the layout of pictures in memory that GPUs with half precision like.
        compile: whether the models go through `torch.compile`.
        log_every: optimizer steps from one reading of the losses to the next.
        progress: whether a bar is shown.
        loggers: where losses and figures go besides the run folder's tables: `tensorboard` (files in the run
            folder), `wandb`, `mlflow`; their own environment variables say where these are.
        ema: decay of the averaged student, which is then what is evaluated and shipped.
        save_every: optimizer steps between checkpoints; one is always written at an evaluation.
        keep: of a finished run's checkpoints: `last`, the last one's weights alone; `all`, the last two and
            the best with all that they hold.
        threads: CPU threads; small models are faster with 1, and the same number gives the same bits.
        patience: ends the run after so many evaluations without a better one, as the best epoch is chosen.
        max_minutes: ends the run after so many minutes, evaluations included, with one evaluation more.
        max_steps: stops after so many optimizer steps, for a trial; a teacher that is made, too.
    """

    epochs: Count | None = None
    steps: Count | None = None
    eval_every: Count | None = None
    eval_epochs: Count | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps"] = "auto"
    devices: Literal["auto"] | Count = "auto"
    num_nodes: Count = 1
    strategy: Literal["auto", "ddp"] = "auto"
    clip_grad_norm: Positive | None = None
    accumulate: Count = 1
    channels_last: bool = False
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    compile: bool = False
    log_every: Count = 10
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]  # noqa: RUF012 (pydantic copies it)
    save_every: Count | None = None
    keep: Literal["last", "all"] = "last"
    patience: Count | None = None
    max_minutes: Positive | None = None
    max_steps: Count | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    progress: bool = True

    @model_validator(mode="before")
    @classmethod
    def _length(cls, content: Any) -> Any:
        """60 epochs where no length is said."""
        if (
            not isinstance(content, dict)
            or content.get("steps") is not None
            or content.get("epochs") is not None
        ):
            return content
        return {**content, "epochs": 60}

    @model_validator(mode="after")
    def _one_length(self) -> "TrainerRecipe":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("needs either epochs or steps")
        if self.eval_every is not None and self.eval_epochs is not None:
            raise ValueError("needs either eval_every (steps) or eval_epochs")
        return self
