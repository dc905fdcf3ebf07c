"""Selects the device of a step and checks whether code can be compiled for it."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Training
from ..errors import MixtuneError, RefusedError

if TYPE_CHECKING:
    import torch

GPUS = "MIXTUNE_GPUS"
ON_GPU = ("flash_attention_2", "flex_attention")
"""Attention implementations that cannot train on a CPU."""


def requested_gpus() -> int:
    """Returns the number of GPUs that the task requested, from the environment; 0 if the variable is not set.

    Raises:
        RefusedError: if the variable is not a number.
    """
    given = os.environ.get(GPUS, "0")
    if not given.isdecimal():
        raise RefusedError(f"{GPUS}: must be a whole number, found {given or 'nothing'}")
    return int(given)


def pick_device() -> torch.device:
    """Returns the GPU of this process if there is one, else the CPU. Of several GPUs, each process has the one of its rank.

    Raises:
        MixtuneError: if torch finds fewer GPUs than the task requested. A retry on another node can succeed.
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
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if available else torch.device("cpu")


def loading_device(training: Training) -> torch.device:
    """Returns the device that a training loads its models on.

    Models that several processes may shard are loaded on the CPU: whole, they need not fit on a GPU. Attention that is
    implemented for GPUs only is checked on one.
    """
    import torch

    return torch.device("cpu") if loads_as_stored(training) else pick_device()


def loads_as_stored(training: Training) -> bool:
    """Tells whether a training loads its models in the number format of their files, and so without a copy of them.

    A process of a sharded training, which several processes can be, then reads its part of the weights only, and converts it.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and training.parallelism != "ddp" and training.attention not in ON_GPU


def has_gpu() -> bool:
    """Tells whether this machine has a GPU that the installed torch can use, as far as this can be determined without torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or _torch_version().endswith("+cpu"):
        return False
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def _torch_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch")
    except PackageNotFoundError:
        return "+cpu"


def require_compiler(option: str) -> None:
    """Checks that torch can compile the code that the option needs.

    Raises:
        RefusedError: if there is no compiler, or if Python's headers are missing.
    """
    on_gpu = pick_device().type == "cuda"
    # Only these compilers are searched by triton, which compiles for the GPU, and by torch, which compiles for the CPU.
    names = [os.environ.get("CC", ""), "gcc", "clang"] if on_gpu else [os.environ.get("CXX", "g++")]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if any(shutil.which(name) for name in names if name) and headers.exists():
        return
    raise RefusedError(
        f"{option}: needs a C++ compiler and Python's headers (packages g++ and python3-dev in Debian), which are not both "
        "here; install them, use an image that holds them (those with CUDA do), or leave the option out"
    )
