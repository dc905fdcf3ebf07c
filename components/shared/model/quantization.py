"""Base weights in 4 bits (QLoRA, arXiv:2305.14314): what they need, and how a model with them is told from others."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import RefusedError

if TYPE_CHECKING:
    import torch
    from torch import nn

NEEDS = "mixed.controls.lora_4bit: needs {what}, which {where} lacks; {advice}, or leave it out"


def missing_for_4_bits(where: str, gpu: bool, packages: bool = True) -> list[str]:
    """Returns what quantised base weights lack, one sentence for each. Does not import torch.

    Args:
        where: words for the place where the trainings run.
        gpu: whether there is a GPU.
        packages: whether that place is this environment, so that its packages are known.
    """
    found = [] if gpu else [NEEDS.format(what="an NVIDIA GPU", where=where, advice="train where there is one")]
    if packages and find_spec("bitsandbytes") is None:
        found.append(NEEDS.format(what="bitsandbytes", where=where, advice="install it (`pip install bitsandbytes`)"))
    return found


def quantizing(device: torch.device) -> dict[str, Any]:
    """Returns the arguments by which transformers quantises a model while it loads.

    Raises:
        RefusedError: if there is no GPU, or if bitsandbytes is not installed.
    """
    if missing := missing_for_4_bits("this environment", device.type == "cuda"):
        raise RefusedError(*missing)
    from ..serving.quantized import in_4_bits

    return in_4_bits(device)


def is_quantized(model: nn.Module) -> bool:
    """Tells whether a model has quantised weights, which are stored as integers."""
    return any(not weight.is_floating_point() for weight in model.parameters())
