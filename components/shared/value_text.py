"""How a measured value with its interval is written in text."""

from __future__ import annotations

from collections.abc import Mapping


def value_text(value: Mapping[str, float | None] | None, digits: int = 3, signed: bool = True) -> str:
    """Writes `+0.021 [-0.008, +0.052]`, without the interval where there is none, and a dash for no value.

    Args:
        value: VALUE as in `report.json`: `value`, `low` and `high`.
        digits: digits behind the point.
        signed: whether a plus sign is written.
    """
    if value is None:
        return "–"
    form = f"{'+' if signed else ''}.{digits}f"
    text = format(value["value"], form)
    return text if value["low"] is None else f"{text} [{value['low']:{form}}, {value['high']:{form}}]"
