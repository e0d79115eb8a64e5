"""The typed description of one run: reading, merging, checking, writing."""

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from diffkd.errors import UserError, nearest

RECIPES = Path(__file__).parent / "recipes"

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about keys and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class OpenSection(Section):
    """A section that also carries the options of what it names; `check_options` checks those."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to what the section names."""
        return dict(self.model_extra or {})


class TaskRecipe(OpenSection):
    """The task, and the weight of its supervised loss."""

    name: str = "classification"
    weight: NotNegative = 1.0


class DataRecipe(OpenSection):
    """The data set and how it is dealt out."""

    name: str
    root: str | None = None
    batch_size: Count = 64
    eval_batch_size: Count | None = None
    workers: Annotated[int, Field(ge=0)] = 2


class ModelRecipe(Section):
    """A model, its weights, and its way of seeing pictures where it differs from the data's."""

    model: str
    weights: str | None = None
    mean: list[float] | None = None
    std: list[Positive] | None = None
    size: Count | None = None


class MethodRecipe(OpenSection):
    """A method's weight and options."""

    weight: NotNegative = 1.0


class Optimizer(Section):
    """What all optimizers share."""

    lr: Positive
    weight_decay: NotNegative = 0.0


class Sgd(Optimizer):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    lr: Positive = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False


class AdamW(Optimizer):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.01
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.999]


class Schedule(Section):
    """What all schedules share; `warmup_epochs` rise linearly from zero."""

    warmup_epochs: NotNegative = 0.0


class ConstantSchedule(Schedule):
    """The same learning rate throughout."""

    name: Literal["constant"] = "constant"


class StepSchedule(Schedule):
    """Multiplies the learning rate by `factor` at each milestone (epochs)."""

    name: Literal["step"] = "step"
    milestones: list[Count]
    factor: Positive = 0.1


class CosineSchedule(Schedule):
    """Half a cosine from 1 down to `final_factor`."""

    name: Literal["cosine"] = "cosine"
    final_factor: Share = 0.0


class PolySchedule(Schedule):
    """`(1 - t) ** power` over the run."""

    name: Literal["poly"] = "poly"
    power: Positive = 0.9


OptimizerRecipe = Sgd | AdamW
ScheduleRecipe = ConstantSchedule | StepSchedule | CosineSchedule | PolySchedule
KINDS: dict[str, dict[str, type[Section]]] = {
    "optimizer": {"sgd": Sgd, "adamw": AdamW},
    "schedule": {
        "constant": ConstantSchedule,
        "step": StepSchedule,
        "cosine": CosineSchedule,
        "poly": PolySchedule,
    },
}


class TrainerRecipe(Section):
    """The loop.

    Attributes:
        ema: decay of the averaged student, which is then what is evaluated and shipped.
        save_every: optimizer steps between checkpoints within an epoch; one is always written at its end.
        threads: CPU threads; small models are faster with 1, and the same number gives the same bits.
        max_steps: stops after so many optimizer steps, for a trial.
    """

    epochs: Count = 60
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps"] = "auto"
    devices: Literal["auto"] | Count = "auto"
    num_nodes: Count = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    clip_grad_norm: Positive | None = None
    accumulate: Count = 1
    channels_last: bool = False
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    compile: bool = False
    log_every: Count = 10
    save_every: Count | None = None
    max_steps: Count | None = None
    threads: Count | None = None
    progress: bool = True


class TeacherTraining(Section):
    """How a teacher is made; what is not said here is as in the student's own run."""

    epochs: Count | None = None
    batch_size: Count | None = None
    optimizer: OptimizerRecipe | None = Field(None, discriminator="name")
    schedule: ScheduleRecipe | None = Field(None, discriminator="name")
    seed: Annotated[int, Field(ge=0)] = 0


class TeacherRecipe(ModelRecipe):
    """The teacher: its weights, or how it is made."""

    train: TeacherTraining | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "TeacherRecipe":
        if self.weights is not None and self.train is not None:
            raise ValueError("give weights or train, not both")
        return self


class Recipe(Section):
    """One run, completely described."""

    name: str = Field("run", exclude=True)
    task: TaskRecipe = TaskRecipe()
    data: DataRecipe
    teacher: TeacherRecipe | None = None
    student: ModelRecipe
    method: dict[str, MethodRecipe] = {}
    taps: dict[str, str] | None = None
    optimizer: OptimizerRecipe = Field(Sgd(), discriminator="name")
    schedule: ScheduleRecipe = Field(CosineSchedule(), discriminator="name")
    trainer: TrainerRecipe = TrainerRecipe()
    seed: Annotated[int, Field(ge=0)] = 0
    output: str | None = None
    resume: bool = False

    def run_folder(self) -> Path:
        """Where the run is written: `output`, or a place under `runs/` named after the recipe."""
        if self.output is not None:
            return Path(self.output)
        methods = "+".join(re.sub(r"\W+", "_", name) for name in self.method) or "none"
        return Path("runs") / self.name / f"{methods}-seed{self.seed}"

    def teacher_recipe(self) -> "Recipe":
        """The run that makes the teacher: its model in the student's place, and no teacher."""
        assert self.teacher is not None
        train = self.teacher.train or TeacherTraining()
        model = ModelRecipe(**self.teacher.model_dump(exclude={"train", "weights"}))
        trainer = {"epochs": train.epochs or self.trainer.epochs, "max_steps": None, "ema": None}
        data = {"batch_size": train.batch_size or self.data.batch_size}
        return self.model_copy(
            update={
                "teacher": None,
                "student": model,
                "method": {},
                "taps": None,
                "data": self.data.model_copy(update=data),
                "optimizer": train.optimizer or self.optimizer,
                "schedule": train.schedule or self.schedule,
                "trainer": self.trainer.model_copy(update=trainer),
                "seed": train.seed,
                "output": None,
                "resume": False,
            }
        )


# --- reading ---------------------------------------------------------------------------------------


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a built-in name or a YAML file, with `key=value` overrides.

    Layers: the recipe's `base`, the recipe, the overrides in order. Mappings merge; `method` and `taps` of
    a file replace the base's, and a new `name` or `model` drops the keys that belong to the old one.

    Raises:
        UserError: anything in it is unknown, missing or impossible; the key is named.

    >>> load("digits", ["trainer.epochs=3", "method=none"]).trainer.epochs
    3
    """
    place = find(name)
    layers = [(str(place), layer) for layer in _read_chain(place)]
    merged: dict[str, Any] = {}
    for where, layer in layers:
        merged = _merge(merged, _normalize(layer, where), replace=("method", "taps"))
    for override in overrides:
        key, value = _parse_override(override)
        if key == "base":
            raise UserError("command line: 'base' belongs in a file")
        # A single key replaces a method; a dotted one changes an option of it.
        replace = ("method", "taps") if "." not in key else ()
        merged = _merge(merged, _normalize(_nest(key, value), "command line"), replace=replace)
    merged["name"] = _short_name(name, place)
    return _validate(merged, str(place) if not overrides else f"{place} with the command line")


def builtin() -> dict[str, Path]:
    """The recipes that come along, by name; files and folders that begin with `_` are bases."""
    found = {}
    for place in sorted(RECIPES.rglob("*.yaml")):
        parts = place.relative_to(RECIPES).with_suffix("").parts
        if not any(part.startswith("_") for part in parts):
            found["/".join(parts)] = place
    return found


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: all that is needed to run it again.

    >>> recipe = load("digits")
    >>> yaml.safe_load(dump(recipe))["seed"]
    0
    """
    content = recipe.model_dump(mode="json", exclude={"output", "resume"})
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110)


def cache_key(recipe: Recipe) -> str:
    """A short name of everything that determines the weights that a recipe trains."""
    content = _determining(recipe)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def difference(one: Recipe, other: Recipe) -> str | None:
    """The first key in which two recipes would train different weights, with both values."""
    pairs = zip(_flatten(_determining(one)), _flatten(_determining(other)), strict=False)
    ours, theirs = dict(_flatten(_determining(one))), dict(_flatten(_determining(other)))
    del pairs
    for key in ours | theirs:
        if ours.get(key) != theirs.get(key):
            return f"{key} is {ours.get(key)} there and {theirs.get(key)} here"
    return None


# What may differ between two runs of the same weights.
_INDIFFERENT = {
    "output": True,
    "resume": True,
    "data": {"workers", "eval_batch_size", "root"},
    "trainer": {"accelerator", "devices", "num_nodes", "strategy", "log_every", "save_every", "progress"},
}


def _determining(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude=_INDIFFERENT)


def _flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, content


def find(name: str) -> Path:
    """The file of a recipe: a built-in name, or a path.

    Raises:
        UserError: there is none.
    """
    known = builtin()
    if name in known:
        return known[name]
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"no recipe file '{name}'")
        return Path(name)
    raise UserError(f"unknown recipe '{name}'{nearest(name, known)} (a file's name ends in .yaml)")


def _short_name(name: str, place: Path) -> str:
    return name if name in builtin() else place.parent.name if place.name == "recipe.yaml" else place.stem


def _read_chain(place: Path, below: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The recipe and its bases, the lowest first."""
    if place in below:
        raise UserError(f"{place}: 'base' comes back to itself")
    content = _read(place)
    base = content.pop("base", None)
    if base is None:
        return [content]
    return [*_read_chain(_find_base(str(base), place), (*below, place)), content]


def _find_base(base: str, place: Path) -> Path:
    for candidate in (place.parent / base, place.parent / f"{base}.yaml", RECIPES / f"{base}.yaml"):
        if candidate.is_file():
            return candidate.resolve()
    raise UserError(f"{place}: base: unknown recipe '{base}'{nearest(base, builtin())}")


def _read(place: Path) -> dict[str, Any]:
    try:
        content = yaml.load(place.read_text(), _Loader)
    except OSError as error:
        raise UserError(f"'{place}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"'{place}' is not a text file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{place}{line}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{place}: a recipe is a mapping of keys, this is {_kind(content)}")
    return content


class _Loader(yaml.SafeLoader):
    """YAML that reads `5e-4` as a number."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"command line: '{override}' is not key=value")
    try:
        return key, yaml.load(text, _Loader) if text else None
    except yaml.YAMLError as error:
        raise UserError(f"command line: {key}: '{text}' cannot be read") from error


def _nest(key: str, value: Any) -> dict[str, Any]:
    """`a.b.c=v` as nested mappings; a method's name may itself hold dots (`my_losses.py:MyLoss`)."""
    parts = re.split(r"\.(?!py:)(?![^.=]*:)", key)
    for part in reversed(parts):
        value = {part: value}
    return value  # type: ignore[no-any-return]


# --- short forms and merging -----------------------------------------------------------------------

_NAMED = {"task": "name", "data": "name", "optimizer": "name", "schedule": "name"}
_NAMED |= {"teacher": "model", "student": "model"}
# Keys that outlive a change of name.
_GENERIC = {
    "task": {"weight"},
    "data": {"batch_size", "eval_batch_size", "workers"},
    "optimizer": {"lr", "weight_decay"},
    "schedule": {"warmup_epochs"},
}


def _normalize(layer: dict[str, Any], where: str) -> dict[str, Any]:
    """A layer with every short form written out."""
    layer = dict(layer)
    for section, name in _NAMED.items():
        if isinstance(layer.get(section), str):
            layer[section] = {name: layer[section]}
    if "method" in layer:
        layer["method"] = _methods(layer["method"], where)
    teacher = layer.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("train"), dict):
        layer["teacher"] = {**teacher, "train": _normalize(teacher["train"], where)}
    return layer


def _methods(value: Any, where: str) -> dict[str, Any]:
    """`diffkd`, `diffkd,kd`, `[diffkd, kd]`, `{diffkd: 0.5}` or the long form as the long form."""
    if value in (None, "none", []):
        return {}
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, list):
        value = {str(name).strip(): {} for name in value}
    if not isinstance(value, dict):
        raise UserError(f"{where}: method: needs names, or names with weights, got {_kind(value)}")
    long: dict[str, Any] = {}
    for name, options in value.items():
        number = isinstance(options, int | float) and not isinstance(options, bool)
        long[name] = {"weight": options} if number else {} if options is None else options
    return {name: options for name, options in long.items() if name != "none"}


def _merge(old: dict[str, Any], new: dict[str, Any], replace: Sequence[str] = ()) -> dict[str, Any]:
    """The new layer over the old."""
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and key not in replace:
            merged[key] = _merge(_survivors(key, before, value), value)
        else:
            merged[key] = value
    return merged


def _survivors(section: str, before: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """What stays of a section when its name or model changes."""
    name = _NAMED.get(section)
    if name is None or name not in value or value[name] == before.get(name):
        return before
    return {key: v for key, v in before.items() if key in _GENERIC.get(section, ())}


# --- checking --------------------------------------------------------------------------------------


def _validate(content: dict[str, Any], where: str) -> Recipe:
    _default_names(content)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_error(error, Recipe)}") from error


def _default_names(content: dict[str, Any]) -> None:
    """Writes the default optimizer and schedule where only their settings are given."""
    train = (content.get("teacher") or {}).get("train") if isinstance(content.get("teacher"), dict) else None
    for owner in (content, train):
        for section, default in (("optimizer", "sgd"), ("schedule", "cosine")):
            if isinstance(owner, dict) and isinstance(owner.get(section), dict):
                owner[section] = {"name": default, **owner[section]}


def _first_error(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """The first of pydantic's errors as one line, in the recipe's own words."""
    errors = error.errors()
    first = min(errors, key=lambda e: (e["type"] != "extra_forbidden", len(e["loc"])))
    key = prefix + ".".join(str(part) for part in first["loc"] if not _is_branch(part))
    more = len({str(e["loc"]) for e in errors}) - 1
    return f"{key}: {_reason(first, model)}" + (f" (and {more} more)" if more else "")


def _is_branch(part: Any) -> bool:
    """Names that pydantic puts into a place for the branch of a union that it tried."""
    return isinstance(part, str) and (part in _BRANCHES or "[" in part)


_BRANCHES = {"sgd", "adamw", "constant", "step", "cosine", "poly"} | {"literal['auto']", "int", "float"}


def _reason(error: Any, model: type[BaseModel]) -> str:
    kind, got = error["type"], error["input"]
    limits = error.get("ctx", {})
    if kind == "extra_forbidden":
        known = _keys_at(model, error["loc"][:-1])
        return f"unknown key{nearest(str(error['loc'][-1]), known)}"
    if kind == "missing":
        return "is needed"
    if kind == "union_tag_invalid":
        return f"unknown '{limits['tag']}'{nearest(str(limits['tag']), re.findall(r'[a-z]+', limits['expected_tags']))}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", limits["expected"])
        return f"unknown {got!r}{nearest(str(got), choices)}"
    for limit, words in _LIMITS.items():
        if limit in limits:
            return f"{words} {limits[limit]}, got {got!r}"
    if kind == "value_error":
        return str(limits["error"])
    wanted = next((words for part, words in _TYPES.items() if kind.startswith(part)), error["msg"])
    return f"needs {wanted}, got {_kind(got)}"


_LIMITS = {"ge": "needs at least", "gt": "needs more than", "le": "needs at most", "lt": "needs less than"}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "too_": "a list of that length",
    "dict": "a mapping of keys",
    "model": "a mapping of keys",
    "union_tag": "a mapping of keys",
}


def _keys_at(model: type[BaseModel], place: Sequence[Any]) -> list[str]:
    """Keys that a recipe knows at a place."""
    if len(place) > 1 and place[0] in KINDS and place[1] in KINDS[place[0]]:
        return list(KINDS[place[0]][place[1]].model_fields)
    for part in place:
        if part in KINDS:
            return sorted({key for kind in KINDS[part].values() for key in kind.model_fields})
        field = model.model_fields.get(str(part))
        if field is None:
            continue
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((t for t in inner if inspect.isclass(t) and issubclass(t, BaseModel)), model)
    return [key for key in model.model_fields if key != "name" or model is not Recipe]


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return repr(value)


# --- options of what a recipe names ----------------------------------------------------------------


def check_options(recipe: Recipe) -> None:
    """Checks the options of task, data set and methods against what these take.

    Raises:
        UserError: a name or an option is unknown, or a value has the wrong type.
    """
    from diffkd.data.base import builder
    from diffkd.methods.base import method_class
    from diffkd.tasks.base import task_class

    _check_call(task_class(recipe.task.name), recipe.task, "task")
    _check_call(builder(recipe.data.name), recipe.data, "data")
    for name, method in recipe.method.items():
        _check_call(method_class(name), method, f"method.{name}")


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
        raise UserError(_first_error(error, options, f"{where}.")) from error


