"""Weights in 4 bits by bitsandbytes: NormalFloat, with quantised constants, products in bf16 (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig


def in_4_bits(device: torch.device) -> dict[str, Any]:
    """Returns the arguments by which transformers quantises a model while it loads it onto a GPU."""
    settings: Any = BitsAndBytesConfig
    chosen = settings(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": chosen, "device_map": {"": device}}
