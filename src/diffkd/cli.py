"""The command line: parse, call, print. Heavy imports wait until a command needs them."""

import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from diffkd import __version__
from diffkd.errors import UserError, plain

if TYPE_CHECKING:
    from diffkd.recipe.schema import Recipe

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Knowledge distillation for vision: make a small, fast model of a large, accurate one.",
    epilog="Made teachers are kept in the folder that the environment variable DIFFKD_CACHE names.",
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in recipe or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides, nested by dots: trainer.epochs=5 seed=1. All keys: diffkd settings",
    ),
]

RunFolderName = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a student's folder.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Knowledge distillation for vision: make a small, fast model of a large, accurate one."""
    if version:
        print(f"diffkd {__version__}")
        raise typer.Exit


@app.command()
def distill(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Distil the recipe's teacher into its student; control=true trains the student alone, too."""
    from diffkd.recipe.schema import load

    wanted = load(recipe, overrides or [])
    if wanted.method and wanted.teacher is None:
        raise UserError(f"recipe '{recipe}' has no teacher; set teacher=..., or use: diffkd train {recipe}")
    _run(wanted)


@app.command()
def train(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Train the recipe's student alone, without a teacher; words on teacher and methods are passed by."""
    from diffkd.recipe.schema import load

    alone = [word for word in overrides or [] if not word.startswith(("teacher.", "method.", "taps"))]
    _run(load(recipe, [*alone, "method=none", "teacher=null"]))


@app.command()
def compare(
    recipe: RecipeName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[methods=...] [seeds=N] [jobs=N] [tune=N] [KEY=VALUE]...",
            help="methods=none,kd,diffkd+dkd seeds=3 jobs=2 output=FOLDER, and overrides for all runs; "
            "tune=20 chooses each method's weight and options first, by so many trials on held-out training "
            "data (tune_epochs=N or tune_steps=N for shorter ones, tune_fraction=0.1)",
        ),
    ] = None,
) -> None:
    """Train the recipe's student by several methods alike, over seeds, and report the differences."""
    from diffkd.report.compare import Wanted
    from diffkd.report.compare import compare as run_all

    run_all(Wanted.parse(recipe, overrides or []))


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[split=test|val|train] [which=last|best] [output=FOLDER] [KEY=VALUE]...",
            help="Where the data are, or others: data.root=...",
        ),
    ] = None,
) -> None:
    """Evaluate a run's student on its test data again, or on other data."""
    from diffkd.report.evaluation import evaluate_run

    for line in evaluate_run(run, overrides or []):
        print(plain(line))


@app.command()
def predict(
    run: RunFolderName,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="PICTURES... [output=FOLDER] [top=5] [threshold=0.3] [which=best] [trust=true]",
            help="Files, folders, patterns.",
        ),
    ],
) -> None:
    """Let a run's student answer for pictures: classes, label maps or boxes."""
    from diffkd.use.predict import predict_words

    _say_unreadable(predict_words(run, words))


@app.command()
def export(
    run: RunFolderName,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="to=onnx|torch_export|torchscript|safetensors|timm [KEY=VALUE]...",
            help="output, which, with_preparation, dynamic_batch, dynamic_size, opset, quantize, verify",
        ),
    ] = None,
) -> None:
    """Write a run's student for another runtime, and prove that it answers alike."""
    from diffkd.use.export import ExportOptions
    from diffkd.use.export import export as write

    write(run, ExportOptions.parse(options or []))


@app.command()
def visualize(
    run: RunFolderName,
    pictures: Annotated[
        list[str],
        typer.Argument(
            metavar="PICTURES... [output=FOLDER] [which=best] [trust=true]", help="Files, folders, patterns."
        ),
    ],
) -> None:
    """Show the denoising: the student's feature before, on its way and after, and the teacher's."""
    from diffkd.use.visualize import visualize_words

    _say_unreadable(visualize_words(run, pictures))


@app.command()
def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Build everything and run one batch: what is tapped, what it costs, what learns.

    All pictures' headers are read; decode=true decodes them whole.
    """
    from diffkd.recipe.schema import load

    words = overrides or []
    wanted = load(recipe, [word for word in words if word not in ("decode=true", "decode=false")])
    from diffkd.report.check import check_recipe

    check_recipe(wanted, decode="decode=true" in words)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(metavar="[recipes|methods|models|data]")] = "",
    like: Annotated[str, typer.Argument(metavar="[TEXT]", help="Only names that contain it.")] = "",
) -> None:
    """List what there is: recipes, methods, models, data."""
    from diffkd.report.listing import listing
    from diffkd.report.settings import wrapped

    for line in listing(what, like):
        for part in wrapped(line, _width(), 4):
            print(part)


@app.command()
def settings(
    what: Annotated[
        str, typer.Argument(metavar="[SECTION|METHOD|DATA|TASK|KEY]", help="None: all sections.")
    ] = "",
) -> None:
    """Every key of a recipe with its type, its default and what it does."""
    from diffkd.report.settings import settings as lines

    for line in lines(what, _width()):
        print(line)


@app.command()
def schema() -> None:
    """Print a JSON schema of recipes, for editors of YAML."""
    import json

    from diffkd.report.settings import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def clean(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[teachers] [older=30d] [yes=true]", help="Without words, only a list."),
    ] = None,
) -> None:
    """List the teachers kept in the cache (DIFFKD_CACHE) and the runs in runs/, with size and age, and which
    runs need a teacher; remove teachers on request that no run needs.
    """
    from diffkd.report.clean import Wanted, found_runs, kept_teachers, remove, told

    wanted = Wanted.parse(words or [])
    if not wanted.remove:
        for run in found_runs():
            print(f"run {run}")
    found = kept_teachers(wanted.older)
    for kept in found:
        print(kept)
    print(told(found, "teachers"))
    free = [kept for kept in found if not kept.users]
    if wanted.remove and found:
        left = ", the others are needed" * (len(free) < len(found))
        if not free or wanted.sure or typer.confirm(f"remove {told(free, 'of them')}{left}?"):
            for line in remove(found):
                print(line)
    elif free:
        line = f"diffkd clean teachers  removes what no run needs: {told(free, 'of them')}"
        print(line, file=sys.stderr)


def _width() -> int | None:
    """Characters of a terminal's line; None where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _say_unreadable(lines: Sequence[str]) -> None:
    for line in lines:
        print(plain(line), file=sys.stderr)
    if lines:
        raise typer.Exit(1)


def _run(recipe: "Recipe") -> None:
    # Imported now, not at the top: a mistake in the recipe has already shown, without a wait.
    from diffkd.data.base import data_kept
    from diffkd.report.evaluation import LastEvaluation
    from diffkd.report.finish import finish
    from diffkd.training.control import fit_with_control

    last = LastEvaluation()
    with data_kept():
        finish(fit_with_control(recipe, witness=last), last)


def main() -> None:
    """Runs the command line; a user's mistake is one line and exit status 2."""
    # Of several processes the last to leave would show how a connection ended, with stack frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _end_with_parent()
    warnings.formatwarning = _warning  # type: ignore[assignment]
    try:
        app()
    except UserError as error:
        _stop(f"error: {error}", 2)
    except KeyboardInterrupt:
        _stop("stopped", 130)
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        _stop(f"error: {error.filename or 'output'}: {error.strerror}", 2)
    except Exception as error:
        if type(error).__name__ != "InterruptedRunError":
            raise
        _stop(str(error), 128 + error.signal)  # type: ignore[attr-defined]


def _end_with_parent() -> None:
    """Where another diffkd started this one, Linux ends it (as TERM does) as soon as that one is gone."""
    parent = os.environ.pop("DIFFKD_PARENT", None)
    if parent is None or sys.platform != "linux":
        return
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if str(os.getppid()) != parent:  # gone already
        raise SystemExit(128 + signal.SIGTERM)


def _warning(message: Warning | str, *_: object) -> str:
    """How Python's warnings look: one line, without a place in the code, which says a user nothing."""
    return f"warning: {plain(str(message).partition(chr(10))[0])}\n"


def _stop(line: str, status: int) -> None:
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # of several processes one speaks
        print(plain(line), file=sys.stderr)
    if "diffkd.training.ranks" in sys.modules:
        from diffkd.training.ranks import is_one_of_several, leave

        if is_one_of_several():
            leave(status)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
