"""The typed description of one run: reading, merging, checking, writing."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError, create_model, model_validator

from diffkd.errors import UserError, nearest
from diffkd.recipe.base import Count, NotNegative, Section
from diffkd.recipe.errors import first_error
from diffkd.recipe.files import RECIPES, code_names, read_layers, teachers_in
from diffkd.recipe.models import ModelRecipe as ModelRecipe
from diffkd.recipe.models import TeacherRecipe as TeacherRecipe
from diffkd.recipe.models import TeacherTraining as TeacherTraining
from diffkd.recipe.training import CosineSchedule, OptimizerRecipe, ScheduleRecipe, Sgd, TrainerRecipe
from diffkd.recipe.words import own_texts


class OpenSection(Section):
    """A section that also carries the options of what it names; `check_options` checks those."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to what the section names."""
        return dict(self.model_extra or {})


class TaskRecipe(OpenSection):
    """The task, and the weight of its supervised loss beside a method's; without a method it is 1.

    Attributes:
        name: `classification`, `segmentation`, `detection`, or a class of your own by `file.py:Class`.
        weight: of the supervised losses; 1 where nothing is distilled.
    """

    name: str = "classification"
    weight: NotNegative = 1.0


class DataRecipe(OpenSection):
    """The data set and how it is dealt out.

    Attributes:
        name: of the kind of data (`diffkd list data`), or a function of your own by `file.py:function`.
        root: the folder where the data are.
        batch_size, eval_batch_size: pictures of a batch, on all devices together.
        workers: processes that read pictures, on each device; 0 reads in the training process.
        val_fraction: share of the training samples (of every class, where known) held out: as the test split
            where there is none, else for validation.
        test_on: `val` puts the validation samples (a tenth if `val_fraction` is not said) in the place of
            the test samples, which are then not used: to try settings without a look at the test data.
        limit: how many training samples are used, or their share below 1, of every class alike: to try
            whether a run works.
        class_weights: of each class in the loss, in their order; `balanced` makes rare ones count as much.
        class_order: how classes that have names are numbered: `name`, as the alphabet has them (1, 10, 2);
            `natural`, numbers in names counting as such (1, 2, 10); or all names in their order. As the data
            set has them if not given, or as weights know them.
        unlabelled: a folder of pictures without labels, which methods learn from beside the training samples.
            An epoch has all of both; every batch has its share of labelled ones.
        mixup, cutmix: parameters of their Beta distributions; 0 leaves them out. The share and the kind
            are drawn for a batch; several devices mix the same pictures as one, where the batch can be
            divided by twice their number.
    """

    name: str
    root: str | None = None
    batch_size: Count = 64
    eval_batch_size: Count | None = None
    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    test_on: Literal["test", "val"] = "test"
    limit: Annotated[float, Field(gt=0, lt=1)] | Count | None = None
    class_weights: list[NotNegative] | Literal["balanced"] | None = None
    class_order: list[str] | Literal["name", "natural"] | None = None
    unlabelled: str | None = None
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0


class MethodRecipe(OpenSection):
    """A method's weight and options.

    Attributes:
        weight: of its losses; none is its paper's, and `auto` is measured.
        taps: the student's layers that it learns from, of those that are tapped; all where none are named.
            `{layer3: 0.5, layer4: 1.0}` gives each a factor of the weight.
        schedule: factors of the weight over the run, `[[0, 0.0], [0.1, 1.0], [1, 0.5]]`: at a share of the
            run, with straight lines between.
    """

    weight: NotNegative | Literal["auto"] | None = None
    taps: list[str] | dict[str, NotNegative] | None = None
    schedule: list[list[NotNegative]] | None = None

    @property
    def choice(self) -> dict[str, Any]:
        """What a Distiller wants to hear of it."""
        return {"weight": self.weight, "taps": self.taps, "schedule": self.schedule, **self.options}

    @model_validator(mode="after")
    def _points(self) -> "MethodRecipe":
        if any(len(point) != 2 for point in self.schedule or ()):
            raise ValueError("schedule needs pairs [share of the run, factor], such as [[0, 1], [1, 0]]")
        return self


class Recipe(Section):
    """One run, completely described.

    Attributes:
        name: of the run, from the recipe's own.
        task: what is learnt, and its options.
        data: what is learnt from.
        teacher, student: the two models.
        teachers: further teachers by name, each as `teacher`: every method learns from each of them.
        method: the methods by name, each with its weight and options.
        taps: layers of the student by their paths, each with the layer of the teacher that it learns from
            (with `teachers` also such a mapping for each teacher by its name); null chooses them.
        optimizer: kind and options.
        schedule: how the learning rate changes over the run.
        trainer: the loop.
        seed: of everything random; one seed gives one result.
        output: the run's folder; null makes one in `runs`, named after recipe, methods and seed.
        resume: whether a run that was stopped goes on.
        control: whether `distill` also trains the student alone, as a run of its own.
        published: by `teacher`, `none` (the student alone) and method, the figures that the literature gives
            for these models and this training, in %; dropped where the command line changes either.
    """

    name: str = Field("run", exclude=True)
    task: TaskRecipe = TaskRecipe()
    data: DataRecipe
    teacher: TeacherRecipe | None = None
    teachers: dict[str, TeacherRecipe] = Field(default_factory=dict)
    student: ModelRecipe
    method: dict[str, MethodRecipe] = Field(default_factory=dict)
    taps: dict[str, str] | dict[str, dict[str, str]] | None = None
    optimizer: OptimizerRecipe = Field(Sgd(), discriminator="name")
    schedule: ScheduleRecipe = Field(CosineSchedule(), discriminator="name")
    trainer: TrainerRecipe = TrainerRecipe()
    seed: Annotated[int, Field(ge=0)] = 0
    output: str | None = None
    resume: bool = False
    control: bool = Field(False, exclude=True)
    published: dict[str, float] = Field(default_factory=dict, exclude=True)

    def run_folder(self) -> Path:
        """Where the run is written: `output`, or a place under `runs/` named after the recipe."""
        if self.output is not None:
            return Path(self.output)
        methods = "+".join(re.sub(r"\W+", "_", name) for name in self.method) or "none"
        return Path("runs") / self.name / f"{methods}-seed{self.seed}"

    @model_validator(mode="after")
    def _named_teachers(self) -> "Recipe":
        if self.teachers and self.teacher is None:
            raise ValueError("teachers are further ones beside teacher: say teacher=... first")
        odd = [name for name in self.teachers if not name.isidentifier() or name == "teacher"]
        if odd:
            raise ValueError(f"teachers are called by words of letters, digits and _, not '{odd[0]}'")
        named = {name for name, layer in (self.taps or {}).items() if isinstance(layer, dict)}
        if named and named != {*self.every_teacher}:
            names = ", ".join(self.every_teacher) or "there is none"
            raise ValueError(
                f"taps by teacher name each of them once ({names}), not {', '.join(sorted(named))}"
            )
        return self

    @property
    def every_teacher(self) -> dict[str, TeacherRecipe]:
        """All teachers by name; the first is called `teacher`."""
        return {} if self.teacher is None else {"teacher": self.teacher, **self.teachers}

    def taps_of(self, teacher: str = "teacher") -> dict[str, str] | None:
        """The taps of one teacher; None chooses them."""
        own = (self.taps or {}).get(teacher)
        return own if isinstance(own, dict) else self.taps  # type: ignore[return-value]

    @property
    def task_weight(self) -> float:
        """Weight of the supervised losses: `task.weight` where something is distilled, else 1."""
        return self.task.weight if self.method else 1.0

    @property
    def step_size(self) -> int:
        """Pictures of one optimizer step, on all devices together."""
        return self.data.batch_size * self.trainer.accumulate

    @property
    def learning_rate(self) -> float:
        """`optimizer.lr`, scaled to the pictures of a step where it is meant for so many."""
        meant = self.optimizer.lr_batch
        return self.optimizer.lr * (self.step_size / meant if meant else 1.0)

    def teacher_recipe(self, name: str = "teacher") -> "Recipe":
        """The run that makes a teacher: its model in the student's place, and no teacher."""
        teacher = self.every_teacher[name]
        train = teacher.train or TeacherTraining()
        model = ModelRecipe(**teacher.model_dump(exclude={"train", "share"}))
        told = train if train.epochs or train.steps else self.trainer
        trainer = {"epochs": told.epochs, "steps": told.steps, "ema": None}
        trainer |= {"patience": None, "max_minutes": None}  # of the run, not of what many runs share
        data = {"batch_size": train.batch_size or self.data.batch_size, "unlabelled": None}
        return self.model_copy(
            update={
                "teacher": None,
                "teachers": {},
                "student": model,
                "method": {},
                "taps": None,
                "task": self.task.model_copy(update={"weight": 1.0}),
                "data": self.data.model_copy(update=data),
                "optimizer": train.optimizer or self.optimizer,
                "schedule": train.schedule or self.schedule,
                "trainer": self.trainer.model_copy(update=trainer),
                "seed": train.seed,
                "output": None,
                "resume": False,
                "control": False,
                "published": {},
            }
        )


def load(
    name: str, overrides: Sequence[str] = (), *, trust: bool = False, methods: Sequence[str] = ()
) -> Recipe:
    """A recipe from a built-in name or a YAML file, with `key=value` overrides.

    Layers: the recipe's `base`, the recipe, the overrides (whole sections before what is in them).
    Mappings merge; `method` and `taps` of a file replace the base's, and a new `name` or `model` drops
    the keys that belong to the old one.

    Args:
        name: of the recipe, or its file.
        overrides: those of a command line; `trust=true` among them is as `trust`.
        trust: takes names of code out of a file, too; without it whoever runs somebody else's recipe
            would run the code that it names.
        methods: whose options may be set although the recipe does not use them.

    Raises:
        UserError: anything in it is unknown, missing or impossible; the key is named.

    >>> load("digits", ["trainer.epochs=3", "method=none"]).trainer.epochs
    3
    """
    content, place, trusted = read_layers(name, overrides, methods)
    for key, code in code_names(content):
        if not trust and code not in trusted:
            raise UserError(f"{place}: {key} '{code}' would run code; add trust=true if you trust it")
    own_texts(content, overrides)
    if content.get("teacher") is None and not content.get("method"):
        content.pop("teachers", None)  # of a student that is trained alone
    if (place.parent / "checkpoints").is_dir() and isinstance(content.get("optimizer"), dict):
        # a run's own recipe: before weights were told apart, everything decayed
        content["optimizer"].setdefault("no_decay", "none")
    if content.get("resume") and not content.get("output") and (place.parent / "checkpoints").is_dir():
        content["output"] = str(place.parent)  # a run's own recipe.yaml
    if not all(map(_keeps_published, overrides)):
        content.pop("published", None)
    data = content.get("data")
    for key in ("root", "unlabelled"):
        if isinstance(data, dict) and isinstance(data.get(key), str):
            data[key] = os.path.abspath(os.path.expanduser(data[key]))  # noqa: PTH100, PTH111
    _at_home(content, "output")
    for side in (content.get("student"), *teachers_in(content)):
        _at_home(side, "weights")
    where = f"recipe '{name}'" if place.is_relative_to(RECIPES) else str(place)
    return _validate(content, f"{where} with the command line" if overrides else where)


def _at_home(section: Any, key: str) -> None:
    """A path that begins with `~/` as a shell would write it out, which does so for few words of ours."""
    if isinstance(section, dict) and isinstance(place := section.get(key), str) and place[:2] == "~/":
        section[key] = os.path.expanduser(place)  # noqa: PTH111


def _keeps_published(word: str) -> bool:
    """Whether an override leaves models and training as a recipe's published figures have them.

    >>> [_keeps_published(word) for word in ("seed=1", "method=kd", "data.root=x", "trainer.epochs=1")]
    [True, True, True, False]
    """
    key = word.partition("=")[0]
    indifferent = ("output", "resume", "seed", "control", "trust", "data.root", "data.workers", "method")
    how = (
        "accelerator",
        "devices",
        "num_nodes",
        "strategy",
        "threads",
        "progress",
        "keep",
        "log_every",
        "loggers",
    )
    return key in indifferent or key.removeprefix("trainer.") in how


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: all that is needed to run it again.

    >>> recipe = load("digits")
    >>> yaml.safe_load(dump(recipe))["seed"]
    0
    """
    content = recipe.model_dump(mode="json", exclude={"output", "resume"})
    text: str = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110)
    return text


def _validate(content: dict[str, Any], where: str) -> Recipe:
    _default_names(content)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {first_error(error, Recipe)}") from error
    if recipe.method and all(method.weight == 0 for method in recipe.method.values()):
        raise UserError(f"{where}: method: all weights are zero; give one a weight, or say method=none")
    return recipe


def _default_names(content: dict[str, Any]) -> None:
    """Writes the default optimizer and schedule where only their settings are given."""
    for owner in (content, *(teacher.get("train") for teacher in teachers_in(content))):
        for section, default in (("optimizer", "sgd"), ("schedule", "cosine")):
            if isinstance(owner, dict) and isinstance(owner.get(section), dict):
                owner[section] = {"name": default, **owner[section]}


def check_options(recipe: Recipe) -> None:
    """Checks the options of task, data set and methods against what these take.

    Raises:
        UserError: a name or an option is unknown, a value has the wrong type, or labels are needed that
            are not wanted.
    """
    from diffkd.data.base import builder
    from diffkd.methods.base import method_class
    from diffkd.tasks.base import task_class

    _check_labels(recipe)
    _check_call(task_class(recipe.task.name), recipe.task, "task")
    _check_call(builder(recipe.data.name), recipe.data, "data")
    for name, method in recipe.method.items():
        _check_call(method_class(name), method, f"method.{name}")


def _check_labels(recipe: Recipe) -> None:
    if recipe.data.options.get("labels") != "none":
        return
    if recipe.data.unlabelled is not None:
        raise UserError("data.labels=none takes no label at all: leave out data.unlabelled")
    if not recipe.method:
        raise UserError("data.labels=none without a method to distil with: there is nothing to learn from")
    if any(teacher.train is not None for teacher in recipe.every_teacher.values()):
        raise UserError(
            "data.labels=none: a teacher cannot be trained without labels; give teacher.weights=FILE "
            "teacher.train=null"
        )


def _check_call(build: Any, section: OpenSection, where: str) -> None:
    from diffkd.names import options_of

    known = options_of(build)
    for option in section.options:
        if option not in known:
            keys = [*known, *type(section).model_fields]
            raise UserError(f"{where}.{option}: unknown key{nearest(option, keys)}")
    fields: dict[str, Any] = {
        name: (Any if p.annotation is p.empty else p.annotation, ... if p.default is p.empty else p.default)
        for name, p in known.items()
    }
    config = ConfigDict(strict=True, arbitrary_types_allowed=True, protected_namespaces=())
    options = create_model("Options", __config__=config, **fields)
    try:
        options(**section.options)
    except ValidationError as error:
        raise UserError(first_error(error, options, f"{where}.")) from error
