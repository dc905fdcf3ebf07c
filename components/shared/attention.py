"""Attention of a bf16 model on a CPU: in float32.

PyTorch's attention kernel for CPUs takes up to four times as long for a backward pass in bf16 as in float32 (measured with 2.13
at rows of some hundred tokens; at 512 the two are even), as long as all matrix products of a small model together. So
queries, keys and values are widened for the kernel alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "sdpa_in_float32"


def _in_float32(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    with torch.autocast(query.device.type, enabled=False):
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **given)
    return out.to(query.dtype), None


AttentionInterface.register(_NAME, _in_float32)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextlib.contextmanager
def fast_attention(lms: Sequence[PreTrainedModel], device: torch.device, precision: str) -> Iterator[None]:
    """Has models that run in bf16 on a CPU use float32 in their attention, where that is PyTorch's.

    Args:
        lms: the model that is trained, and those that it is compared with meanwhile: what they differ by must not be rounding.
    """
    slow = device.type == "cpu" and precision == "bf16"
    widened = [lm for lm in lms if slow and lm.config._attn_implementation == "sdpa"]
    for lm in widened:
        lm.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        for lm in widened:
            lm.set_attn_implementation("sdpa")
