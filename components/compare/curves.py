"""Sums up the curve of a training for `report.json`: how far each loss fell, what each stream contributed to the steps, and
what was measured on the watched sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

STREAMS = ("pretrain", "finetune")
LAST_PART = 5
"""The last loss is the mean over the last 1/5 of the logged values, since single values are noisy."""

Curve = Sequence[Mapping[str, Any]]


def losses(curve: Curve) -> dict[str, dict[str, float] | None]:
    """Returns for each stream the first logged loss and the mean of the last ones; None for a stream that was not read."""
    found: dict[str, dict[str, float] | None] = {}
    for stream in STREAMS:
        values = [float(entry[f"loss_{stream}"]) for entry in curve if entry.get(f"loss_{stream}") is not None]
        last = values[-max(1, len(values) // LAST_PART) :]
        found[stream] = {"first": values[0], "last": fmean(last)} if values else None
    return found


def gradients(curve: Curve) -> dict[str, Any] | None:
    """Returns means over the measurements of both streams' gradients; None if there are none.

    The names are `norm_pretrain` and `norm_finetune` (of the mean losses, not multiplied by λ), `cosine`, `norm_share_pretrain`
    (in the norm), `share_pretrain` (of the step), and `measurements`, their number.
    """
    measured = [entry for entry in curve if entry.get("step_share_pretrain") is not None]
    if not measured:
        return None
    names = {
        "norm_pretrain": "grad_norm_pretrain",
        "norm_finetune": "grad_norm_finetune",
        "cosine": "grad_cosine",
        "norm_share_pretrain": "norm_share_pretrain",
        "share_pretrain": "step_share_pretrain",
    }
    means = {name: fmean(float(entry[logged]) for entry in measured) for name, logged in names.items()}
    return {**means, "measurements": len(measured)}


def watched(curve: Curve, seconds: float) -> dict[str, Any] | None:
    """Returns the last measurements on the watched sample, and what all of them cost; None if nothing was watched.

    Args:
        curve: the curve of a training.
        seconds: time of the training.

    Returns:
        `forgetting` in bits per byte, `loss_finetune`, the number of `measurements`, their `seconds`, and their
        `training_share` in the time of the training.
    """
    measured = [entry for entry in curve if "watch_seconds" in entry]
    if not measured:
        return None
    took = sum(float(entry["watch_seconds"]) for entry in measured)
    return {
        "forgetting": measured[-1].get("watch_forgetting"),
        "loss_finetune": measured[-1].get("watch_loss_finetune"),
        "measurements": len(measured),
        "seconds": took,
        "training_share": took / seconds if seconds else None,
    }
