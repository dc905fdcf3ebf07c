"""Formats measured values with their intervals."""

from __future__ import annotations

from collections.abc import Mapping


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
