"""Files of tensors read without running what is in them, and called what they are where they are none."""

import argparse
import datetime
import pathlib
import pickle
import re
import types
import zipfile
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from diffkd.errors import UserError


def read_tensors(place: Path) -> Any:
    """The content of a `.safetensors` or PyTorch file.

    Of a PyTorch file only tensors, plain values and harmless types are taken, such as the settings and
    dates that training scripts put beside their weights.

    Raises:
        UserError: it cannot be read, holds code, or is something else; that is named.
    """
    plain = _check_kind(place)
    try:
        if plain:
            return load_file(place)
        with torch.serialization.safe_globals(_harmless()), place.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds a {named[1]}, which could run code" if named else "it could run code, or is damaged"
        new = f"'{place.stem}.safetensors'"
        raise UserError(
            f"'{place}' is not a plain weights file: {what}; where you trust it, convert it: import torch; "
            f"from safetensors.torch import save_file; x = torch.load('{place.name}', weights_only=False); "
            f"save_file(x['state_dict'], {new}), or x['model'].state_dict() where it holds a whole model"
        ) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"'{place}' cannot be read ({type(error).__name__}: {reason}): damaged, or no weights"
        ) from error


def _check_kind(place: Path) -> bool:
    """Whether a file holds safetensors, whatever it is called; names what often stands in its place.

    Raises:
        UserError: it is empty, a pointer to a file elsewhere, a page, another library's, or no file.
    """
    try:
        if not place.is_file():
            raise UserError(f"no weights file '{place}'")
        with place.open("rb") as file:
            whole = file.read(512)
    except OSError as error:
        raise UserError(f"'{place}' cannot be read: {error.strerror}") from error
    start = whole.lstrip().lower()
    if not start:
        raise UserError(f"'{place}' cannot be read: it is empty (0 bytes)")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"'{place}' is a Git LFS pointer, not the weights: fetch them with: git lfs pull")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError(f"'{place}' is an HTML page, not weights: the download went wrong")
    if len(whole) > 9 and whole[8:9] == b"{" and int.from_bytes(whole[:8], "little") < 1 << 40:
        return True
    kind = next((kind for magic, kind in _OTHERS.items() if start.startswith(magic)), None)
    if kind is None and start[:2] == b"pk":
        kind = _kind_of_archive(place)
    if kind is not None:
        raise UserError(f"'{place}' is {kind}")
    return place.suffix == ".safetensors" and start[:1] not in (b"p", b"\x80")


_OTHERS = {
    b"{": "text in JSON, not weights: the download went wrong, or it lists other files",
    b"\x1f\x8b": "compressed: unpack it with gunzip or tar",
    b"\x89hdf": "an HDF5 file, as Keras writes it: save the weights with PyTorch or safetensors",
    b"\x08": "an ONNX file, it seems: save the weights of the model that it was made of",
    b"\x93numpy": "an array of NumPy, without names: save the weights with PyTorch or safetensors",
    b"gguf": "a GGUF file: save the weights with PyTorch or safetensors",
}


def _kind_of_archive(place: Path) -> str | None:
    """What an archive that is no PyTorch weights file is; None where it may be one."""
    try:
        with zipfile.ZipFile(place) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return "damaged: the archive has no end; copy or download it again"
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        return (
            "TorchScript, a whole program: take it as a teacher by a function of your own that returns "
            "torch.jit.load(...), or save its state_dict()"
        )
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy: save the arrays with PyTorch or safetensors"
    if not any(name.endswith("data.pkl") for name in names):
        return "an archive without PyTorch's weights in it; unpack it, or save a state_dict()"
    return None


def _harmless() -> list[Any]:
    """Types that training scripts save beside their weights and that run nothing when they are read."""
    core = getattr(np, "_core", None) or np.core
    kinds = [
        type(np.dtype(code))
        for code in ("bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
    ]
    return [
        *(
            argparse.Namespace,
            types.SimpleNamespace,
            Counter,
            deque,
            defaultdict,
            set,
            frozenset,
            complex,
            slice,
        ),
        *(list, dict, tuple, int, float, str),
        *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
        *(pathlib.PurePosixPath, pathlib.PureWindowsPath, type(Path())),
        *(np.dtype, np.ndarray, core.multiarray.scalar, core.multiarray._reconstruct),
        *((core.multiarray.scalar, "numpy.core.multiarray.scalar"),),
        *((core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),),
        *dict.fromkeys(kinds),
    ]
