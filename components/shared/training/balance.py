"""Counts how a mixture of experts routes the tokens of an optimizer step, for the loss that balances its experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator

from ..model.experts import Routing
from ..model.mixed_model import MixedModel
from ..model.packing import Batch
from ..model.sharding import release


@torch.no_grad()
def routing_of_step(
    model: MixedModel, batches: Callable[[], Iterable[Batch]], accelerator: Accelerator
) -> Routing | None:
    """Returns the routing of all tokens of all ranks, from a forward pass of its own; None for models without experts.

    Dropout draws the same numbers as in the pass that follows.

    Args:
        model: the trained model.
        batches: returns this rank's micro-batches.
    """
    if not model.balance_weight:
        return None
    device = accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), accelerator.autocast():
        found = [model.routing(batch) for batch in batches()]
    release(model)
    total = sum(found[1:], found[0])
    return Routing(accelerator.reduce(total.choices, "sum"), accelerator.reduce(total.rows, "sum"))
