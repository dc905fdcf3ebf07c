"""The number format of matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

from ..third_party.torch import has_bf16_products
from .device import pick_device


def pick_precision(precision: Literal["auto", "float32", "bf16"]) -> Literal["float32", "bf16"]:
    """Resolves `auto` to bf16 if the device supports it natively, else to float32."""
    if precision != "auto":
        return precision
    if pick_device().type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if has_bf16_products() else "float32"


@contextlib.contextmanager
def autocast(device: torch.device, precision: Literal["auto", "float32", "bf16"]) -> Iterator[None]:
    """Runs matrix products in the given precision."""
    with torch.autocast(device.type, torch.bfloat16, enabled=pick_precision(precision) == "bf16"):
        yield
