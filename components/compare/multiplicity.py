"""What choosing among several candidates does to the verdict, and how many examples the gate's margin needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from .config import POWER
from .selection import ELIGIBLE, Measured, two_digits
from .statistics import Value, simultaneous

COMPARED = ("task_score_vs_finetuned", "task_score_vs_champion", "task_score_vs_trivial")
"""Differences whose intervals decide about the gate."""


def in_contest(candidates: Sequence[Measured]) -> list[Measured]:
    """Returns the candidates among which one is selected."""
    return [one for one in candidates if one.kind in ELIGIBLE and not one.replicate]


def corrected(candidates: Sequence[Measured], coverage: float) -> list[Measured]:
    """Widens the intervals of the gate's conditions so that each condition holds for all eligible candidates together.

    The more candidates there are, the likelier one of them meets a condition by chance. With simultaneous intervals the chance
    that any candidate wrongly meets a condition is that of a single one. No correction is needed for several conditions, since
    a candidate must meet all of them (R. Berger 1982, Multiparameter hypothesis testing and acceptance sampling).

    Args:
        candidates: measurements on one split.
        coverage: coverage of the intervals.
    """
    contest = [one.id for one in in_contest(candidates)]
    found = {one.id: one for one in candidates}
    for name in COMPARED:
        measured = [(key, value) for key in contest if (value := getattr(found[key], name)) is not None]
        for (key, _), value in zip(measured, simultaneous([value for _, value in measured], coverage), strict=True):
            changes: dict[str, Any] = {name: value}
            found[key] = replace(found[key], **changes)
    return list(found.values())


def selection_note(count: int, metric: str) -> str | None:
    """Says what selecting one of several candidates does to its score on dev; None if there is nothing to select from."""
    if count < 2:
        return None
    return (
        f"One of {count} candidates is selected on dev, so its {metric} there is optimistic: the best of several is partly the "
        f"luckiest. That on test is not. The gate's intervals hold for all {count} candidates together."
    )


@dataclass(frozen=True)
class Power:
    """How many examples tell that a drop is within the gate's margin, planned like a trial of non-inferiority (S. Julious 2004,
    Tutorial in Biostatistics: Sample sizes for clinical trials with Normal data, doi:10.1002/sim.1783).

    With se the standard error of the difference on n examples, h half of its interval and δ the margin, a candidate that is as
    good as fine-tuning alone meets the gate's condition with a chance of Φ((δ - h) / se). Both h and se fall with √n, so the
    chance is `POWER` for n · ((h + z · se) / δ)² examples, where Φ(z) is `POWER`.

    Attributes:
        candidate: id of the candidate whose difference to fine-tuning alone was measured.
        margin: largest accepted drop.
        half_width: half of the interval of the difference, h.
        examples: number of examples on the split on which the gate decides.
        chance: chance that a candidate as good as fine-tuning alone meets the condition, with these examples.
        needed: number of examples for a chance of `POWER`, to two digits.
    """

    candidate: str
    margin: float
    half_width: float
    examples: int
    chance: float
    needed: int

    @property
    def sentence(self) -> str:
        """Says whether the examples suffice."""
        verdict = "enough" if self.needed <= self.examples else f"too few, the chance is about {self.chance:.0%}"
        return (
            f"A margin of {self.margin:g} (gate.max_score_drop) needs about {self.needed:,} labelled examples on dev, so that "
            f"a candidate as good as fine-tuning alone meets it with a chance of {POWER:.0%} (estimated from how "
            f"{self.candidate} and fine-tuning alone disagree); there are {self.examples:,}: {verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the values in the format of `report.json`."""
        return {**vars(self), "sentence": self.sentence}


def power(candidates: Sequence[Measured], selected: str, margin: float) -> Power | None:
    """Measures the power of the gate on the selected candidate, or on the one with the best score if that is fine-tuning alone.

    The width of an interval falls with the square root of the number of examples.

    Args:
        candidates: measurements on the split on which the gate decides, with the intervals that it uses.

    Returns:
        None if no drop is accepted, or if no candidate's answers differ from those of fine-tuning alone.
    """
    differ = [(one, value) for one in in_contest(candidates) if (value := _spread(one)) is not None]
    if not differ or not margin:
        return None
    one, value = max(differ, key=lambda pair: (pair[0].id == selected, _score(pair[0])))
    half, error = (value.high - value.low) / 2, float(np.std(np.asarray(value.replicates)))
    chance = NormalDist().cdf((margin - half) / error)
    needed = two_digits(one.examples * ((half + NormalDist().inv_cdf(POWER) * error) / margin) ** 2)
    return Power(one.id, margin, half, one.examples, chance, needed)


def _spread(one: Measured) -> Value | None:
    """Returns the difference to fine-tuning alone, if the resamples vary."""
    value = one.task_score_vs_finetuned
    return value if value is not None and value.replicates is not None and np.ptp(value.replicates) > 0 else None


def _score(one: Measured) -> float:
    return one.task_score.value if one.task_score is not None else -math.inf
