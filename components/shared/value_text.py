"""Formats measured values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def value_text(value: Mapping[str, float | None] | None, digits: int = 3, signed: bool = True) -> str:
    """Formats a value as `+0.021 [-0.008, +0.052]`; without the interval if it has none; a dash for None.

    Args:
        value: a value of `report.json`: `value`, `low` and `high`.
        digits: digits after the decimal point.
        signed: whether positive values get a plus sign.
    """
    if value is None:
        return "–"
    form = f"{'+' if signed else ''}.{digits}f"
    text = format(value["value"], form)
    return text if value["low"] is None else f"{text} [{value['low']:{form}}, {value['high']:{form}}]"


def losses_text(metrics: Mapping[str, float | None]) -> str:
    """Formats the last metrics of a training as `λ 0.3, loss 3.214 (pretrain 4.110, finetune 2.318)`.

    Args:
        metrics: `loss`, and `loss_pretrain`, `loss_finetune` and `mix_weight` if the training has them.
    """
    text = f"loss {metrics['loss']:.3f}"
    pretrain, finetune = metrics.get("loss_pretrain"), metrics.get("loss_finetune")
    if pretrain is None or finetune is None:
        return text
    mix_weight = metrics.get("mix_weight")
    weight = f"λ {mix_weight:.3g}, " if mix_weight is not None else ""
    return f"{weight}{text} (pretrain {pretrain:.3f}, finetune {finetune:.3f})"


def lambda_of(row: Mapping[str, Any]) -> float | None:
    """Returns the constant λ of a candidate in a report: the configured one, or the one found for its forgetting budget."""
    tried = (row.get("forgetting_budget") or {}).get("tried")
    found: float | None = tried[-1]["lambda"] if tried else row.get("lambda")
    return found
