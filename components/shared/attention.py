"""Attention of a bf16 model on a CPU: in float32.

PyTorch's attention kernel for CPUs takes ten times as long for a backward pass in bf16 as in float32 (measured with 2.13), more
than all matrix products of a small model together. So queries, keys and values are widened for the kernel alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
def fast_attention(lm: PreTrainedModel, device: torch.device, precision: str) -> Iterator[None]:
    """Has a model that is trained in bf16 on a CPU use float32 in its attention, where that is PyTorch's."""
    widened = device.type == "cpu" and precision == "bf16" and lm.config._attn_implementation == "sdpa"
    if widened:
        lm.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        if widened:
            lm.set_attn_implementation("sdpa")
