"""Finds the strongest interpolation that keeps to the gate's limit on forgetting."""

from __future__ import annotations

from collections.abc import Callable

from ..shared.running.context import Context
from .config import AlphaSearch, EvaluateStep
from .held_out import HeldOut
from .measuring import LoadedCandidate
from .subject import Subject

STEPS = 100
"""α is a multiple of 1 / STEPS."""


def find_alpha(
    between: Callable[[float], Subject],
    search: AlphaSearch,
    config: EvaluateStep,
    held_out: HeldOut,
    context: Context,
) -> float | None:
    """Finds the largest α whose forgetting on dev is within the limit, by bisection.

    Forgetting is assumed to rise with α. The text is the sample of dev on which the gate decides.

    Args:
        between: returns the interpolated model with a given α, from 0 to 1.
        search: the limits of the gate.

    Returns:
        α; None if fine-tuning alone (α = 1) keeps to the limit, or no multiple of 1 / `STEPS` above 0 does.
    """

    def bits_per_byte(step: int) -> float:
        subject = between(step / STEPS)
        model = subject.load(config.precision)
        loaded = LoadedCandidate(subject, model, subject.words(), config, held_out, context)
        found = loaded.documents(("dev",))["dev"][1]["bpb"]
        return float("inf") if found is None else float(found)

    before = bits_per_byte(0)
    forgets = bits_per_byte(STEPS) - before
    limit = search.limit(forgets)
    if forgets <= limit:
        context.say(
            f"interpolation: fine-tuning alone forgets {forgets:.3f} bits per byte on dev, which the gate accepts"
        )
        return None
    low, high = 0, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bits_per_byte(middle) - before <= limit else (low, middle)
    context.say(f"interpolation: α = {low / STEPS:g} forgets at most {limit:.3f} bits per byte on dev")
    return low / STEPS if low else None
