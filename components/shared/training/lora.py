"""Low-rank adapters (LoRA, arXiv:2106.09685) with peft. `model/adapters.py` writes those that are not merged."""

from __future__ import annotations

from typing import Any

from ..model.mixed_model import MixedModel
from .optimizer import is_task_head


def add_adapters(model: MixedModel, rank: int) -> None:
    """Adds adapters to all linear layers of the backbone. Freezes everything except adapters and task head."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    prefix = model.lm.base_model_prefix
    backbone: Any = model.lm.base_model
    pooler = r".*pooler.*" if getattr(backbone, "pooler", None) is not None else None
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=pooler)
    setattr(model.lm, prefix, get_peft_model(backbone, settings))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # peft rounds new adapters to the number format of the weights. A sharded training converts those only later.
            module.reset_lora_parameters("default", init_lora_weights=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or is_task_head(name))


def merge_adapters(model: MixedModel) -> None:
    """Merges the adapters into the base weights and removes them. Each process of a sharded training merges its part."""
    prefix = model.lm.base_model_prefix
    adapted: Any = model.lm.get_submodule(prefix)
    setattr(model.lm, prefix, adapted.merge_and_unload())
