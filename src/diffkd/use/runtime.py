"""ONNX: written, run and brought to 8 bits."""

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffkd.errors import UserError


def needs(what: str) -> None:
    """Raises UserError where a library that a format wants is not installed."""
    wanted = ("onnx", "onnxscript", "onnxruntime") if what == "onnx" else ()
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"to={what} needs the package '{name}': pip install 'diffkd[export]'")


def write_onnx(
    module: nn.Module, images: Tensor, place: Path, dynamic: dict[int, Any], opset: int | None
) -> None:
    """Writes a module as one ONNX file.

    Args:
        module: from `images` to one tensor, in eval mode.
        images: an example, `(B, C, H, W)`, two or more where the batch is dynamic.
        place: the file.
        dynamic: axes of the images that may differ.
        opset: of ONNX; None leaves it to the exporter.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, on its own future
        torch.onnx.export(
            module,
            (images,),
            place,
            input_names=["images"],
            output_names=["scores"],
            dynamo=True,
            dynamic_shapes=(dynamic or None,),
            opset_version=opset,
            external_data=False,
            verbose=False,
        )


class Onnx:
    """An ONNX file as a function of a tensor, run on the CPU.

    Args:
        place: the file; it takes `images` and gives one tensor.
    """

    def __init__(self, place: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(place, options, providers=["CPUExecutionProvider"])
        self.batch = self.session.get_inputs()[0].shape[0]

    def __call__(self, images: Tensor) -> Tensor:
        """What the model gives for pictures `(B, C, H, W)`."""
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

    quantize_static(
        place,
        small,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
