"""diffkd: knowledge distillation for vision, with Knowledge Diffusion (NeurIPS 2023) at its heart."""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Nothing here shows tqdm's bars; that they lack ipywidgets would be the first thing a notebook says.
warnings.filterwarnings("ignore", message="IProgress not found")

if TYPE_CHECKING:
    from diffkd.batch import Batch
    from diffkd.data.base import Data
    from diffkd.distiller import Distiller
    from diffkd.errors import UserError
    from diffkd.methods.base import Method, Setup
    from diffkd.methods.diffkd import DiffKD
    from diffkd.report.run import Comparison, Run, compare, distill, train
    from diffkd.tasks.base import Figures, Task
    from diffkd.use.student import load_student

# Loaded on first use, so that the command line answers before PyTorch is imported.
_HOMES = {
    "Batch": "batch",
    "Comparison": "report.run",
    "Data": "data.base",
    "DiffKD": "methods.diffkd",
    "Distiller": "distiller",
    "Figures": "tasks.base",
    "Method": "methods.base",
    "Setup": "methods.base",
    "Task": "tasks.base",
    "UserError": "errors",
    "Run": "report.run",
    "compare": "report.run",
    "distill": "report.run",
    "load_student": "use.student",
    "train": "report.run",
}

__all__ = [
    "Batch",
    "Comparison",
    "Data",
    "DiffKD",
    "Distiller",
    "Figures",
    "Method",
    "Run",
    "Setup",
    "Task",
    "UserError",
    "__version__",
    "compare",
    "distill",
    "load_student",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffkd' has no attribute '{name}'")
    return getattr(importlib.import_module(f"diffkd.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
