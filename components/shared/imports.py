"""Imports of thousands of modules, in less time."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator

OPTIONAL_IN_MLFLOW = ("numpy", "pandas", "pyarrow", "scipy")
"""What `mlflow-skinny` does without: data sets, signatures of models, evaluation; none of it is used by MLflow's client."""


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Keeps the garbage collector away from imports, and then from what they brought, which stays to the end anyway.

    It would look at all of that again and again, and once more when the process ends: measured 1.4 of 4.9 s of a process that
    imports what training needs.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # once in a process, or what is garbage by then would stay as well
            gc.freeze()
        if was_on:
            gc.enable()


@contextlib.contextmanager
def light_mlflow() -> Iterator[None]:
    """Imports MLflow as if its optional packages were not installed, as under `mlflow-skinny`, which has the same code.

    MLflow imports whatever it can find, and its client needs none of these. A step that does can import them afterwards.
    """
    hidden = [name for name in OPTIONAL_IN_MLFLOW if name not in sys.modules and "mlflow" not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: Python raises ModuleNotFoundError
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def complete_mlflow() -> None:
    """Gives MLflow the parts that `light_mlflow` left out, which it needs to log a model."""
    for name in ("mlflow.types", "mlflow.models"):
        importlib.reload(importlib.import_module(name))
