"""How far results on a GPU may be from the reference, and which checks need one."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import pytest
import torch

FLOAT32 = 1e-5
"""Gradients in float32 against float64, tensor by tensor: the norm of the difference over the norm."""
BF16 = 0.1
"""The same where matrix products are in bf16."""
BF16_LOSS = 1e-2
"""Losses in bf16 against float64, relative."""
NATS = 1e-5
"""Losses that evaluation reads, in float32 on a GPU against float32 on a CPU, relative."""
RUN_TO_RUN = 1e-3
"""Weights after some steps of gradient descent, without deterministic algorithms, relative to how far they moved."""

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
needs_flash_attention = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("flash_attn") is None, reason="needs a GPU and the package flash_attn"
)
