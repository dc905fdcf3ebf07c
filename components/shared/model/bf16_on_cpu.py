"""Runs some operations of a bf16 model in float32 on a CPU, where that is faster and equally exact.

Attention: PyTorch's kernel for CPUs takes up to four times as long for a backward pass in bf16 as in float32 (measured with
2.13 at rows of some hundred tokens; at 512 the two are even), as long as all matrix products of a small model together.
Queries, keys and values are therefore converted to float32 for the kernel only.

Matrix products, if the processor has no bf16 instructions: emulated with other instructions, they reach a fifth of the rate of
float32. Their operands are rounded to bf16 as before, multiplied in float32, and the result is rounded again. Native bf16
instructions compute the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..third_party.torch import compiled_backward_without_autocast, has_bf16_products
from ..third_party.transformers import attention_implementation

_NAME = "sdpa_in_float32"


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    with torch.autocast(query.device.type, enabled=False):
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **given)
    return out.to(query.dtype), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def _multiply(layer: nn.Linear, x: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return F.linear(x, layer.weight, layer.bias)
    low = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        bias = None if layer.bias is None else layer.bias.to(low).float()
        return F.linear(x.to(low).float(), layer.weight.to(low).float(), bias).to(low)


@contextlib.contextmanager
def fast_bf16(
    lms: Sequence[PreTrainedModel], device: torch.device, precision: str, backward: bool = True
) -> Iterator[None]:
    """Runs operations of bf16 models in float32 on a CPU if they are slow in bf16.

    Args:
        lms: the trained model and its reference models. All are treated alike, so that they do not differ by rounding.
        backward: whether gradients are computed. Without them, nothing is slow on a processor with bf16 instructions.
    """
    if device.type != "cpu" or precision != "bf16" or (not backward and has_bf16_products()):
        yield
        return
    attending = [lm for lm in lms if attention_implementation(lm.config) == "sdpa"]
    layers: list[nn.Linear] = []
    if not has_bf16_products():
        layers = [module for module in nn.ModuleList(lms).modules() if type(module) is nn.Linear]  # without duplicates
    for lm in attending:
        lm.set_attn_implementation(_NAME)
    for layer in layers:
        layer.forward = MethodType(_multiply, layer)  # type: ignore[method-assign]
    try:
        # A compiled backward pass would be cast to bf16 like the forward pass; otherwise PyTorch runs it outside of autocast.
        with compiled_backward_without_autocast() if layers else contextlib.nullcontext():
            yield
    finally:
        for lm in attending:
            lm.set_attn_implementation("sdpa")
        for layer in layers:
            del layer.forward
