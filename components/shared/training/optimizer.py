"""Creates the optimizer and its learning rates: for the backbone, optionally layer by layer, and for the task head."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from ..config import Training
from ..model.mixed_model import MixedModel

BACKBONE, HEAD = "backbone", "head"
_LAYER = re.compile(r"\.(?:layers?|h|blocks?|block)\.(\d+)\.")
_DECAY_SHARE = 0.2  # fraction of all steps that warmup_stable_decay spends on the decay


def make_optimizer(model: MixedModel, training: Training) -> Optimizer:
    """Creates AdamW over all trainable parameters, with weight decay on matrices only (not on norms and biases).

    The parameter groups have a `name`: `backbone`, `backbone-<levels below the top>` or `head`.
    """
    head_rate = training.head_learning_rate or training.learning_rate
    layers = 1 + max((_layer(name) for name, _ in model.named_parameters()), default=-1)
    groups: dict[tuple[str, float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2
        if is_task_head(name):
            key = (HEAD, head_rate, matrix)
        else:
            below = levels_below_the_top(name, layers)
            rate = training.learning_rate * training.layer_decay**below
            key = (f"{BACKBONE}-{below}" if training.layer_decay < 1 and below else BACKBONE, rate, matrix)
        groups.setdefault(key, []).append(parameter)
    listed: list[dict[str, Any]] = [
        {"params": parameters, "name": name, "lr": rate, "weight_decay": training.weight_decay if matrix else 0.0}
        for (name, rate, matrix), parameters in groups.items()
    ]
    return AdamW(listed, lr=training.learning_rate, fused=True)


def make_schedule(optimizer: Optimizer, training: Training, steps: int) -> LRScheduler:
    """Creates the learning rate schedule over `steps` optimizer steps, a pure function of the step."""
    special: dict[str, Any] = {}
    if training.schedule == "warmup_stable_decay":
        special["num_decay_steps"] = max(1, round(_DECAY_SHARE * steps))
    # The `constant` schedule of transformers ignores warm-up.
    name = "constant_with_warmup" if training.schedule == "constant" else training.schedule
    return get_scheduler(name, optimizer, training.warmup_steps, steps, scheduler_specific_kwargs=special)


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Returns the learning rates to log: the backbone's highest, its lowest if different, and the head's."""
    rates = {str(group["name"]): float(group["lr"]) for group in optimizer.param_groups}
    backbone = [rate for name, rate in rates.items() if name.startswith(BACKBONE)]
    logged = {}
    if backbone:
        logged["learning_rate"] = max(backbone)
        if min(backbone) < max(backbone):
            logged["lowest_learning_rate"] = min(backbone)
    if HEAD in rates:
        logged["head_learning_rate"] = rates[HEAD]
    return logged


def is_task_head(name: str) -> bool:
    """Tells whether a parameter of a `MixedModel` belongs to the task head. An encoder's pooler does."""
    return name.startswith("task.") or ".pooler." in name


def levels_below_the_top(name: str, layers: int) -> int:
    """Returns 0 for the top layer and the weights above it, `layers` for the embeddings.

    Weights of low-rank adapters have the level of their layer.
    """
    layer = _layer(name)
    if layer >= 0:
        return layers - 1 - layer
    return layers if re.search(r"embed|\.wte\.|\.wpe\.", name) else 0


def _layer(name: str) -> int:
    match = _LAYER.search(name)
    return int(match.group(1)) if match else -1
