"""Private names of torch."""

from __future__ import annotations

import contextlib

import torch
import torch._functorch.config as functorch_config
from torch import nn


def has_bf16_products() -> bool:
    """Tells whether this process multiplies bf16 matrices with native instructions of the CPU.

    The processor must have them, and oneDNN must be allowed to use them (`ONEDNN_MAX_CPU_ISA`). torch has a public function for
    the first condition only.
    """
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every supported version
    return bool(known.get("avx512_bf16", False)) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def compiled_backward_without_autocast() -> contextlib.AbstractContextManager[None]:
    """Compiles backward passes without the autocast of the forward pass, as PyTorch runs them if they are not compiled."""
    return functorch_config.patch(backward_pass_autocast="off")


def uncompile(module: nn.Module) -> None:
    """Reverts `module.compile()`, for which torch has no public function."""
    module._compiled_call_impl = None
