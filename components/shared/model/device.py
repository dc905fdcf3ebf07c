"""Where a step computes: on the GPU or on the CPU, and whether what is compiled at run time can be compiled there."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MixtuneError, RefusedError

if TYPE_CHECKING:
    import torch

GPUS = "MIXTUNE_GPUS"


def requested_gpus() -> int:
    """How many GPUs the task was placed with, as its environment says; 0 where it says nothing.

    Raises:
        RefusedError: if the variable holds no number.
    """
    given = os.environ.get(GPUS, "0")
    if not given.isdecimal():
        raise RefusedError(f"{GPUS}: must be a whole number, found {given or 'nothing'}")
    return int(given)


def pick_device() -> torch.device:
    """The GPU where there is one, else the CPU.

    Raises:
        MixtuneError: if the task was placed with more GPUs than torch finds. Another node may have them.
    """
    import torch

    requested = requested_gpus()
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if available < requested:
        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise MixtuneError(
            f"the task asked for {requested} GPU{'s' if requested > 1 else ''}, but torch finds {available or 'none'}; the "
            f"usual causes are an image without CUDA (torch {torch.__version__} here {build}), a driver on the node that is "
            "too old for it, and a device plugin that is missing on the node; set `gpus` to 0 to compute on the CPU"
        )
    return torch.device("cuda" if available else "cpu")


def require_compiler(option: str) -> None:
    """Makes sure that torch can compile what the option needs.

    Raises:
        RefusedError: if there is no compiler, or no headers of Python.
    """
    on_gpu = pick_device().type == "cuda"
    # triton, which compiles for the GPU, and torch, which compiles for the CPU, look for these and no others.
    names = [os.environ.get("CC", ""), "gcc", "clang"] if on_gpu else [os.environ.get("CXX", "g++")]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if any(shutil.which(name) for name in names if name) and headers.exists():
        return
    raise RefusedError(
        f"{option}: needs a C++ compiler and Python's headers (packages g++ and python3-dev in Debian), which are not both "
        "here; install them, use an image that holds them (those with CUDA do), or leave the option out"
    )
