"""Orthogonal subspace fine-tuning (OSF: N. Nayak et al. 2025, arXiv:2504.07097) with peft.

Each matrix is split by its singular values. The directions with the largest ones stay as they are; the others are trained, with
gradients orthogonal to the former. AdamW rescales each weight's gradient by its own history, so that its steps are orthogonal
only approximately. The result is merged into the weights, so that the saved model is plain.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import RefusedError
from ..model.mixed_model import MixedModel
from .optimizer import is_task_head


def split_by_singular_values(model: MixedModel, kept: float) -> None:
    """Splits all linear layers of the backbone. Freezes everything except the trained directions and the task head.

    `merge_adapters` in `lora.py` merges the result.

    Args:
        kept: fraction of each matrix's singular directions that stay as they are.

    Raises:
        RefusedError: if the backbone has no linear layers of torch.
    """
    from peft import OSFConfig, get_peft_model

    prefix = model.lm.base_model_prefix
    backbone: Any = model.lm.base_model
    layers = [name for name, module in backbone.named_modules() if type(module) is nn.Linear and "pooler" not in name]
    if not layers:
        raise RefusedError(
            f"mixed.controls.osf_shares: peft's OSF splits linear layers of torch, and a model of type "
            f"{model.config.model_type} has none; leave it out"
        )
    settings = OSFConfig(effective_rank=kept, target_modules=layers)
    setattr(model.lm, prefix, get_peft_model(backbone, settings))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("osf_svd_params" in name or is_task_head(name))
