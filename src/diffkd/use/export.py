"""The student alone in a format that other runtimes read, checked against the eager model on the spot."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from diffkd import __version__
from diffkd.assembly import Parts, assemble
from diffkd.errors import UserError, first_line, nearest
from diffkd.maths.randomness import seed_everything
from diffkd.recipe.schema import load
from diffkd.recipe.sides import Side
from diffkd.tasks.detection import Detection
from diffkd.training.evaluation import evaluate
from diffkd.use.deploy import Detector, Distance, Standing, deployed, distance, examples
from diffkd.use.runtime import Onnx, Runtime, loaded, needs, write
from diffkd.use.student import Student, load_student, read_config, student_folder

Format = Literal["onnx", "torch_export", "torchscript", "safetensors", "timm"]
SUFFIX = {"onnx": ".onnx", "torch_export": ".pt2", "torchscript": ".torchscript"}
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExportOptions:
    """What is wanted of an export.

    Attributes:
        to: the format.
        output: the file or folder; None is a place in the run folder's `export/`.
        with_preparation: normalisation is in the model, which then takes uint8 pictures.
        dynamic_batch: any number of pictures at once.
        dynamic_size: pictures of any size, where the model allows it.
        opset: of ONNX; None leaves it to the exporter.
        quantize: "int8" writes an ONNX model of 8-bit weights and activations beside the other.
        trust: runs the code that the run folder names.
        which: of a run's students the "last" epoch's or the "best" one's.
        verify: "sample" compares outputs on a few test pictures; "full" also measures the test data.

    Raises:
        UserError: an option is unknown or does not go with another.
    """

    to: Format = "onnx"
    output: str | None = None
    with_preparation: bool = False
    dynamic_batch: bool = True
    dynamic_size: bool = False
    opset: int | None = None
    quantize: Literal["int8"] | None = None
    verify: Literal["sample", "full"] = "sample"
    trust: bool = False
    which: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        kinds = (("to", Format), ("verify", Literal["sample", "full"]), ("which", Literal["last", "best"]))
        for name, kind in kinds:
            value = getattr(self, name)
            if value not in get_args(kind):
                raise UserError(f"{name}={value}: unknown{nearest(str(value), get_args(kind))}")
        if self.quantize not in (None, "int8"):
            raise UserError(f"quantize={self.quantize}: only int8 is known")
        if self.quantize and self.to != "onnx":
            raise UserError("quantize=int8 needs to=onnx")
        if self.with_preparation and self.to in ("safetensors", "timm"):
            raise UserError(
                f"with_preparation=true: to={self.to} holds weights alone; use onnx or torch_export"
            )

    @classmethod
    def parse(cls, words: list[str]) -> "ExportOptions":
        """From `key=value` words.

        Raises:
            UserError: a word is no such pair, or its key or value is unknown.

        >>> ExportOptions.parse(["to=torch_export", "with_preparation=true"]).with_preparation
        True
        """
        known = {f.name: f for f in fields(cls)}
        found: dict[str, Any] = {}
        for word in words:
            key, equals, text = word.partition("=")
            if not equals or key not in known:
                raise UserError(f"command line: '{word}'{nearest(key, known)}")
            found[key] = _value(key, text)
        return cls(**found)


def _value(key: str, text: str) -> Any:
    if key in ("with_preparation", "dynamic_batch", "dynamic_size", "trust"):
        if text not in ("true", "false"):
            raise UserError(f"{key}={text}: needs true or false")
        return text == "true"
    if key == "opset":
        if not text.isdigit():
            raise UserError(f"opset={text}: needs a number, such as 18")
        return int(text)
    return None if text in ("", "none", "null") else text


def export(run: str, options: ExportOptions, say: Callable[[str], None] = print) -> Path:
    """Writes a run's student in another format and proves that it gives the same answers.

    Args:
        run: a run folder, or a student's folder.
        options: what is wanted.
        say: is told, a line each, what was written and how far its answers are from the eager model's.

    Returns:
        The file or folder written.

    Raises:
        UserError: the model cannot be exported so, or its answers differ; nothing is left behind then.
    """
    folder = student_folder(run, options.which)
    student = load_student(run, trust=options.trust, which=options.which)
    needs(options.to)
    _refuse(student, options)
    if not (Path(run) / "recipe.yaml").is_file() and (options.verify == "full" or options.quantize):
        raise UserError("verify=full and quantize=int8 need the run folder, for its data")
    place = _place(run, folder, options)
    place.parent.mkdir(parents=True, exist_ok=True)
    if options.to in ("safetensors", "timm"):
        return _folder(run, folder, place, student, options, say)
    parts = _parts(run, options.trust)
    images = examples(student, parts, options.with_preparation)
    module = deployed(student, options.with_preparation, images)
    told = _told(student, module, options)
    partial = place.with_name(f"writing-{place.name}")
    axes = ({0} if options.dynamic_batch else set()) | ({2, 3} if options.dynamic_size else set())
    try:
        example = images[:1] if isinstance(module, Detector) else images
        write(module, example, partial, options.to, axes, options.opset, told)
        line = _compared(distance(module, loaded(partial, options.to), images), options, len(images), parts)
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)
    say(f"written: {place} ({line})")
    if isinstance(module, Detector):
        say(
            "it takes one picture of {}x{} at a time (smaller ones with ".format(*module.size)
            + "zeros at the bottom and the right), and gives boxes, scores, labels"
        )
    _beside(place, told)
    _measure(place, told, student, parts, options, say)
    return place


def _compared(found: Distance, options: ExportOptions, count: int, parts: Parts | None) -> str:
    """What the comparison with the eager model says.

    Raises:
        UserError: the answers differ.
    """
    if not found.far <= TOLERANCE:
        far = f"by {found.far:.2g}" if found.far < float("inf") else "in number"
        raise UserError(f"{options.to}: answers differ {far} from the eager model's; nothing is written")
    whose = "test pictures" if parts is not None else "random pictures (no run folder, no data)"
    if found.boxes == 0:
        return f"nothing compared: the model finds no box on {count} {whose}"
    boxes = f", {found.boxes} boxes" if found.boxes is not None else ""
    return f"answers within {found.far:.1g} of the eager model's on {count} {whose}{boxes}"


def _refuse(student: Student, options: ExportOptions) -> None:
    """Raises UserError for what cannot be had of detectors."""
    if not isinstance(student.task, Detection):
        return
    if options.to == "torch_export":
        raise UserError(
            "to=torch_export: the number of boxes depends on the picture, which its graphs cannot follow; "
            "to=onnx and to=torchscript write the whole detector, to=safetensors its weights"
        )
    if options.quantize:
        raise UserError(
            "quantize=int8: not for detectors, whose boxes 8 bits would move; leave it out: to=onnx writes "
            "32 bits, which the tools of your runtime can bring to 16"
        )
    if options.dynamic_size:
        raise UserError(
            "dynamic_size=true: a detector is exported for one picture of one size; leave it out, and resize "
            "and pad pictures to the size that is said then"
        )


def _place(run: str, folder: Path, options: ExportOptions) -> Path:
    if options.output is not None:
        return Path(options.output)
    stem = "student" if options.which == "last" else "student-best"
    name = f"{stem}{SUFFIX.get(options.to, '-' + options.to)}"
    return (Path(run) if folder != Path(run) else folder) / "export" / name


def _parts(run: str, trust: bool) -> Parts | None:
    """What the run was made of, where there is a run folder."""
    recipe = Path(run) / "recipe.yaml"
    if not recipe.is_file():
        return None
    wanted = load(str(recipe), trust=trust)
    seed_everything(wanted.seed)
    return assemble(wanted, with_teacher=False)


def _told(student: Student, module: nn.Module, options: ExportOptions) -> dict[str, Any]:
    """Classes, preparation and figures, for whoever gets the file: in it and beside it."""
    taken = "uint8" if options.with_preparation else "normalised float"
    size = f"(1, C, {module.size[0]}, {module.size[1]})" if isinstance(module, Detector) else "(B, C, H, W)"
    found = {**student.config, "diffkd": __version__, "input": f"{taken} {size}"}
    if isinstance(module, Detector):
        found["padding"] = "zeros at the bottom and the right, where a picture is smaller"
        found["outputs"] = "boxes (n, 4) left, top, right, bottom in pixels; scores (n,); labels (n,) from 0"
    return found


def _beside(place: Path, told: Mapping[str, Any]) -> None:
    """What a file says of itself, as JSON beside it."""
    place.with_name(f"{place.name}.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _measure(
    place: Path,
    told: Mapping[str, Any],
    student: Student,
    parts: Parts | None,
    options: ExportOptions,
    say: Callable[[str], None],
) -> None:
    """The figures that are asked for, on the run's test data."""
    if parts is None:
        return
    if options.verify == "full":
        _reproduce(_standing(loaded(place, options.to), student, parts, options), student, parts, say)
    if options.quantize:
        from diffkd.use.runtime import describe, quantize

        small = place.with_name(f"{place.stem}-int8.onnx")
        loader = parts.loader(parts.data.train, shuffle=True)
        batch = next(iter(loader.epoch()))
        images = batch.images if isinstance(batch.images, Tensor) else torch.stack([batch.images[0]])
        quantize(place, small, images if options.with_preparation else student.prepare(images))
        figures = _figures(_standing(Onnx(small), student, parts, options), parts)
        about = {**told, "quantize": "int8", "figures": figures, "float_figures": told.get("figures", {})}
        describe(small, about)
        _beside(small, about)
        share = small.stat().st_size / place.stat().st_size
        metric, beside = parts.task.metric, _recorded(student, parts, "float")
        figure = f"{metric} {100 * figures[metric]:.2f} %{beside}"
        say(f"written: {small} ({share:.2f} of the size; {figure})")


def _standing(runtime: Runtime, student: Student, parts: Parts, options: ExportOptions) -> Side:
    """An exported file in the student's place."""
    prepare: Any = student.prepare
    if not options.with_preparation:
        standing = Standing(runtime, parts.task)
    elif parts.task.resizes or isinstance(parts.task, Detection):
        standing, prepare = Standing(runtime, parts.task), nn.Identity()
    else:
        standing = Standing(runtime, parts.task, student.prepare, parts.data.image_shape[0])
    return Side(student.config["model"], standing, prepare)


def _reproduce(side: Side, student: Student, parts: Parts, say: Callable[[str], None]) -> None:
    """Measures what was exported on the test data.

    Raises:
        UserError: the run recorded another figure.
    """
    metric, figure = parts.task.metric, _figures(side, parts)[parts.task.metric]
    say(f"{metric} of the exported model: {100 * figure:.2f} %{_recorded(student, parts, 'recorded')}")
    recorded = student.config.get("figures", {}).get(metric)
    if recorded is not None and abs(figure - recorded) > 1e-3:
        raise UserError(f"the exported model's {metric} is {figure:.4f}, the run recorded {recorded:.4f}")


def _recorded(student: Student, parts: Parts, what: str) -> str:
    recorded = student.config.get("figures", {}).get(parts.task.metric)
    return "" if recorded is None else f" ({what}: {100 * recorded:.2f} %)"


def _figures(side: Side, parts: Parts) -> dict[str, float]:
    loader = parts.loader(parts.data.test, shuffle=False)
    try:
        return dict(evaluate(side, parts.task, loader).scalars)
    except UserError:
        raise
    except Exception as error:  # of any runtime
        raise UserError(
            f"what was exported cannot answer for the test data: {first_line(error)}; dynamic_size=true and "
            "dynamic_batch=true let it take pictures of other sizes and numbers"
        ) from error


def _folder(
    run: str, folder: Path, place: Path, student: Student, options: ExportOptions, say: Callable[[str], None]
) -> Path:
    """Weights with a description in a folder, read back."""
    timms = options.to == "timm"
    told = _for_timm(student) if timms else read_config(folder)
    parts = _parts(run, options.trust) if timms or options.verify == "full" else None
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(folder / "model.safetensors", place / "model.safetensors")
    model, line = student.model, ""
    if timms:
        import timm

        channels = len(told["pretrained_cfg"]["mean"])
        model = timm.create_model(f"local-dir:{place}", pretrained=True, in_chans=channels).eval()
        images, again = examples(student, parts, raw=False), replace(student, model=model)
        found = distance(deployed(student, False, images), deployed(again, False, images), images)
        line = f" ({_compared(found, options, len(images), parts)})"
    say(f"written: {place}{line}")
    if options.verify == "full" and parts is not None:
        model = model if timms else load_student(place, trust=options.trust).model
        _reproduce(Side(student.config["model"], model, student.prepare), student, parts, say)
    return place


def _for_timm(student: Student) -> dict[str, Any]:
    """The `config.json` by which `timm.create_model("local-dir:FOLDER")` loads the weights beside it."""
    name = student.config["model"]
    if not name.startswith("timm/"):
        raise UserError(f"to=timm: '{name}' is not one of timm's models; use to=safetensors")
    view, config = student.view, student.config
    size = config.get("size") or view.size or config["image_shape"][1:]
    return {
        "architecture": name.removeprefix("timm/").partition(".")[0],
        "num_classes": config["num_classes"],
        "label_names": list(student.class_names),
        "model_args": config.get("options") or {},
        "pretrained_cfg": {
            "input_size": [len(config["mean"]), *size],
            "interpolation": view.interpolation,
            "crop_pct": view.crop_fraction,
            "mean": config["mean"],
            "std": config["std"],
            "num_classes": config["num_classes"],
        },
    }
