"""Pulls a trained model back to its forgetting budget: along the straight line to the reference model's weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from ..model.adapters import is_adapted
from ..model.mixed_model import MixedModel
from ..model.sharding import like, local
from .control import ControlText

MARGIN = 1.1
"""Share of the limit that other text may reach, as the report tolerates it."""
ERRORS = 1.645 * math.sqrt(2)
"""Standard errors of the control text by which other text of the same size forgets more in one of twenty cases."""
LARGEST_SHARE = 0.95
"""Largest share of the limit that is allowed on control text: other text of the same kind forgot up to 1.11 times as much."""
LEAST_SHARE = 0.5
"""Smallest share of the limit that is allowed, however little the control text tells."""
ALPHAS = tuple(tenths / 10 for tenths in reversed(range(10)))
"""Points at which the line is followed; α is searched for between two of them."""
TOLERANCE = 0.01
"""Relative precision of α. Where forgetting is proportional to α², this is 2 % of it."""


def allowed_forgetting(limit: float, error: float) -> float:
    """Returns the forgetting of control text that a trained model may have.

    With s the standard error of the trained model's forgetting and ε the limit, min(0.95 · ε, 1.1 · ε - 1.645 √2 s) is allowed,
    but at least ε / 2: then the limit is kept on this text, and 1.1 times the limit on other text of the same size in 19 of 20
    cases, as far as s tells (the difference of two such samples has the standard error √2 s).

    Args:
        limit: ε, in nats per token; above 0.
        error: s.
    """
    return max(min(LARGEST_SHARE * limit, MARGIN * limit - ERRORS * error), LEAST_SHARE * limit)


@torch.no_grad()
def pull_back(
    model: MixedModel,
    load_reference: Callable[[], MixedModel],
    control: ControlText,
    found: float,
    allowed: float,
    accelerator: Accelerator,
) -> float:
    """Moves the weights toward the reference model's if the trained model forgets too much of all control text.

    The weights become (1 - α) · reference + α · trained, with the α at which the model forgets what is allowed (WiSE-FT,
    arXiv:2109.01903). The line is followed from the trained model only as long as forgetting falls: weights that moved far can
    lie behind a barrier, and beyond it little of the task is left. Then α is where forgetting stops falling, and the limit may
    be exceeded. The task head does not change, and forgetting does not depend on it. All ranks take part and get the same
    result. Adapters that are not merged are scaled by α instead: with the start model W as the reference, the line to W + B·A
    is W + α·B·A.

    Args:
        model: the trained model, on its device; changed in place. If it has adapters, the reference is the model below them.
        load_reference: loads the reference model, which is needed only if too much is forgotten and there are no adapters.
        control: control text that the reference model has read.
        found: forgetting of the trained model, in nats per token.
        allowed: forgetting that is allowed, in nats per token; above 0.

    Returns:
        α, which is 1 for a model that forgets no more than is allowed.
    """
    alpha = 1.0
    if found > allowed:
        from scipy.optimize import brentq  # most trainings do not need it

        pairs = _factors_b(model) if is_adapted(model) else _weights(model, load_reference())

        def move_to(wanted: float) -> None:
            nonlocal alpha
            for weight, origin in pairs:
                weight.copy_(origin + (weight - origin) * (wanted / alpha))
            alpha = wanted

        excesses = {1.0: found - allowed, 0.0: -allowed}

        def excess(wanted: float) -> float:
            if wanted not in excesses:
                move_to(wanted)
                excesses[wanted] = control.forgetting(model, accelerator)[0] - allowed
            return excesses[wanted]

        best = 1.0
        for after in ALPHAS:
            if excess(after) >= excess(best):
                break  # a barrier
            if excess(after) <= 0:
                best = brentq(excess, after, best, xtol=TOLERANCE * best)
                break
            best = after
        move_to(best)
    return alpha


def _weights(model: MixedModel, reference: MixedModel) -> list[tuple[Tensor, Tensor]]:
    """Returns this process's part of each weight, and of the reference model's."""
    # Parameters instead of the state dict, which lists tied weights twice: they would be moved twice.
    origins = dict(reference.lm.named_parameters())
    return [
        (local(weight), local(like(origins[name], weight)))
        for name, weight in model.lm.named_parameters()
        if name in origins  # an encoder's pooler belongs to the task head
    ]


def _factors_b(model: MixedModel) -> list[tuple[Tensor, Tensor]]:
    """Returns this process's part of each adapter's B, and what it was before the training: 0."""
    factors = [local(weight) for name, weight in model.lm.named_parameters() if ".lora_B." in name]
    return [(factor, torch.zeros_like(factor)) for factor in factors]
