"""Files of tensors read without running what is in them, and called what they are where they are none."""

import argparse
import datetime
import pathlib
import pickle
import re
import types
from collections import Counter, deque
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
    _check_kind(place)
    try:
        if place.suffix == ".safetensors":
            return load_file(place)
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(place, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds a {named[1]}, which could run code" if named else "it could run code, or is damaged"
        raise UserError(
            f"'{place}' is not a plain weights file: {what}; where you trust it, convert it: "
            "import torch; from safetensors.torch import save_file; "
            f"save_file(torch.load('{place.name}', weights_only=False)['state_dict'], "
            f"'{place.stem}.safetensors')"
        ) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"'{place}' cannot be read ({type(error).__name__}: {reason}): damaged, or no weights"
        ) from error


def _check_kind(place: Path) -> None:
    """Names what is often found in the place of weights.

    Raises:
        UserError: it is empty, a pointer to a file elsewhere, a page, or no file.
    """
    try:
        if not place.is_file():
            raise UserError(f"no weights file '{place}'")
        with place.open("rb") as file:
            start = file.read(512).lstrip().lower()
    except OSError as error:
        raise UserError(f"'{place}' cannot be read: {error.strerror}") from error
    if not start:
        raise UserError(f"'{place}' cannot be read: it is empty (0 bytes)")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"'{place}' is a Git LFS pointer, not the weights: fetch them with: git lfs pull")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError(f"'{place}' is an HTML page, not weights: the download went wrong")


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
            set,
            frozenset,
            complex,
            slice,
        ),
        *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
        *(pathlib.PurePosixPath, pathlib.PureWindowsPath, type(Path())),
        *(np.dtype, np.ndarray, core.multiarray.scalar, core.multiarray._reconstruct),
        *((core.multiarray.scalar, "numpy.core.multiarray.scalar"),),
        *((core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),),
        *dict.fromkeys(kinds),
    ]
