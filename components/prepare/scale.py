"""Warns of numbers that a regression head learns slowly."""

from __future__ import annotations

from typing import Any

LARGEST_MEAN = 10.0
SPREADS = (0.1, 10.0)
"""Standard deviations with which a head learns about as fast as with 1."""


def scale_warning(notes: dict[str, Any], column: str) -> str | None:
    """Returns a sentence if the training examples' numbers are far from zero or from a standard deviation of one, else None.

    A new head predicts numbers near zero, and the heads of causal models have no bias that could be set to the mean.

    Args:
        notes: the notes of `prepare`, with `target_mean` and `target_std` of each split in regression.
        column: the column of the numbers.
    """
    if "target_mean" not in notes:
        return None
    mean, spread = notes["target_mean"]["train"], notes["target_std"]["train"]
    if abs(mean) <= LARGEST_MEAN and SPREADS[0] <= spread <= SPREADS[1]:
        return None
    return (
        f"warning: the numbers in the column {column} have the mean {mean:,.4g} and the standard deviation {spread:,.4g}; a "
        f"head learns numbers near 0 with a standard deviation near 1 much faster: write (number - {mean:.4g}) / {spread:.4g} "
        "into the column, and convert predictions back"
    )
