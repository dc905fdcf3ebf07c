"""Mixture-of-experts models: which types mixtune trains, told from their configuration. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BALANCED = ("flex_olmo", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Types whose loss transformers balances over experts by one rule, with the weight `router_aux_loss_coef`."""
ADAPTED_EXPERTS = (
    "mixed.controls.lora_merge: is false, but the model is a mixture of experts, whose adapters can only be merged; set it "
    "to true"
)
COMPILED_EXPERTS = "{option}: does not work with a mixture of experts, whose routing would not be counted; leave it out"
COEFFICIENT = "router_aux_loss_coef"


def has_experts(config: Mapping[str, Any]) -> bool:
    """Tells whether a config.json describes a model in which a token takes some of several experts."""
    parts = [config, config.get("text_config") or {}]
    return any("expert" in name and value for part in parts for name, value in part.items())


def expert_problem(config: Mapping[str, Any], base: str) -> str | None:
    """Returns why a mixture of experts cannot be trained; None if it can, or if the model is none."""
    kind = config.get("model_type")
    if not has_experts(config):
        return None
    if kind not in BALANCED:
        return (
            f"model.base: {base} is a mixture of experts of type {kind}, and mixtune does not know by which loss its routers "
            f"are balanced; use one of the types {', '.join(BALANCED)}, or a dense model"
        )
    weight = config.get(COEFFICIENT, 0)
    if not isinstance(weight, int | float) or weight < 0:
        return f"model.base: {base}: {COEFFICIENT} in config.json must be a number that is not negative, found {weight}"
    return None
