"""Files of other runtimes: written, run, brought to 8 bits."""

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffkd.errors import UserError

Answers = Tensor | tuple[Tensor, ...]
Runtime = Callable[[Tensor], Answers]
ABOUT = "diffkd.json"  # what a TorchScript or torch.export file says of itself
OUTPUTS = {1: ["scores"], 3: ["boxes", "scores", "labels"]}


def needs(what: str) -> None:
    """Raises UserError where a library that a format wants is not installed."""
    wanted = ("onnx", "onnxscript", "onnxruntime") if what == "onnx" else ()
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"to={what} needs the package '{name}': pip install 'diffkd[export]'")


def write(
    module: nn.Module,
    images: Tensor,
    place: Path,
    to: str,
    axes: set[int],
    opset: int | None,
    told: Mapping[str, Any],
) -> None:
    """Writes a module as a file of another runtime.

    Args:
        module: from `images` to one tensor, or to boxes, scores and labels; in eval mode.
        images: an example, `(B, C, H, W)`, two or more where the batch may differ.
        place: the file.
        to: `onnx`, `torch_export` or `torchscript`.
        axes: of the images that may differ.
        opset: of ONNX; None leaves it to the exporter.
        told: what the file says of itself.

    Raises:
        UserError: the module cannot be written so.
    """
    dynamic = dict.fromkeys(axes, torch.export.Dim.AUTO)
    about = json.dumps(told)
    content = BytesIO()  # PyTorch's own writers end the process where a disk is full
    try:
        with torch.no_grad(), _quiet():
            if to == "onnx":
                _write_onnx(module, images, place, dynamic, opset, told)
            elif to == "torchscript":
                traced = torch.jit.trace(module, images, check_trace=False)  # type: ignore[no-untyped-call]
                torch.jit.save(traced, content, _extra_files={ABOUT: about})
            else:
                program = torch.export.export(module, (images,), dynamic_shapes=(dynamic or None,))
                torch.export.save(program, content, extra_files={ABOUT: about})
        if to != "onnx":
            place.write_bytes(content.getbuffer())
    except OSError as error:
        error.filename = str(place)
        raise
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"to={to}: this model cannot be exported: {reason}") from error


def loaded(place: Path, to: str) -> Runtime:
    """A file as a function of pictures `(B, C, H, W)`."""
    if to == "onnx":
        return Onnx(place)
    if to == "torchscript":
        with _quiet():
            return torch.jit.load(place)  # type: ignore[no-any-return,no-untyped-call]
    with place.open("rb") as file:
        found: Runtime = torch.export.load(file).module()
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters speak of their own future, and of how they went about it."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _write_onnx(
    module: nn.Module,
    images: Tensor,
    place: Path,
    dynamic: dict[int, Any],
    opset: int | None,
    told: Mapping[str, Any],
) -> None:
    import onnx

    several = isinstance(module(images), tuple)
    common: dict[str, Any] = {"input_names": ["images"], "opset_version": opset, "verbose": False}
    if several:  # the number of boxes depends on the picture: only tracing follows it
        common |= {"output_names": OUTPUTS[3], "dynamo": False, "dynamic_axes": {n: [0] for n in OUTPUTS[3]}}
    else:
        common |= {"output_names": OUTPUTS[1], "dynamo": True, "dynamic_shapes": (dynamic or None,)}
    torch.onnx.export(module, (images,), place, external_data=False, **common)
    made = onnx.load(place)
    version = next(known.version for known in made.opset_import if known.domain in ("", "ai.onnx"))
    if opset is not None and version != opset:
        raise UserError(f"opset={opset}: this model needs a newer one; {version} can be had")
    _save_described(made, place, told)


def describe(place: Path, told: Mapping[str, Any]) -> None:
    """Writes into an ONNX file what it says of itself, in place of what it said."""
    import onnx

    _save_described(onnx.load(place), place, told)


def _save_described(model: Any, place: Path, told: Mapping[str, Any]) -> None:
    import onnx

    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}
    onnx.helper.set_model_props(model, words)
    onnx.save(model, place)


class Onnx:
    """An ONNX file as a function of a tensor, run on the CPU.

    Args:
        place: the file; it takes `images` and gives one tensor, or several of one picture.

    Attributes:
        size: `(H, W)` of the one picture that a detector takes; None of other models.
    """

    def __init__(self, place: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(place, options, providers=["CPUExecutionProvider"])
        self.batch, _, *size = self.session.get_inputs()[0].shape
        self.several = len(self.session.get_outputs()) > 1
        self.size = tuple(size) if self.several else None

    def __call__(self, images: Tensor) -> Answers:
        """What the model gives for pictures `(B, C, H, W)`."""
        if self.several:
            found = self.session.run(None, {"images": images.cpu().numpy()})
            return tuple(torch.from_numpy(part).to(images.device) for part in found)
        step = self.batch if isinstance(self.batch, int) else len(images)
        parts = [
            self.session.run(None, {"images": part.cpu().numpy()})[0] for part in torch.split(images, step)
        ]
        return torch.from_numpy(np.concatenate(parts)).to(images.device)


def quantize(place: Path, small: Path, images: Tensor) -> None:
    """Static quantisation to 8 bits: weights per channel, activations by the range seen on `images`.

    Args:
        place: the ONNX file.
        small: the file to write.
        images: `(N, C, H, W)` training pictures as the model takes them.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows: Iterator[Tensor] = iter(torch.split(images.cpu(), 8))

        def get_next(self) -> dict[str, Any] | None:
            row = next(self.rows, None)
            return None if row is None else {"images": row.numpy()}

    with _quiet():
        quantize_static(
            place,
            small,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
