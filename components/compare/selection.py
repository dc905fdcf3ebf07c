"""The gate, the selection among candidates that meet it, and the Pareto front. Pure functions of measured values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..shared.value_text import value_text
from .config import Gate
from .statistics import Value

ELIGIBLE = ("finetuned", "mixed", "interpolated")
"""Kinds of candidates that can be selected."""


@dataclass(frozen=True)
class Measured:
    """The measurements of a candidate that selection uses.

    Attributes:
        task_score: None if the model has no trained head.
        task_score_vs_finetuned: paired difference; None if the model has no trained head.
        delta_bpb: forgetting.
        task_score_vs_trivial: paired difference to the best trivial answer; None if that was not measured.
        examples: number of examples of the task.
        task_score_vs_champion: paired difference; None also if there is no champion with a task score.
        capabilities: change from the pretrained model and its standard error, by task; above 0 is better.
        replicate: whether the candidate repeats another with a different seed. Such candidates are not selected, since the best
            of several seeds is biased upwards.
    """

    id: str
    kind: str
    task_score: Value | None
    task_score_vs_finetuned: Value | None
    delta_bpb: Value
    task_score_vs_champion: Value | None = None
    task_score_vs_trivial: Value | None = None
    examples: int = 0
    replicate: bool = False
    capabilities: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One condition of the gate, applied to one candidate.

    Attributes:
        name: option that sets the condition.
        passed: whether the candidate meets it.
        miss: how far the candidate is from meeting it, in the unit of the measured quantity; 0 if it meets it.
        sentence: the measured value and the limit, for people.
    """

    name: str
    passed: bool
    miss: float
    sentence: str


@dataclass(frozen=True)
class Decision:
    """The selected candidate and the reasons.

    Attributes:
        selected: id of the selected candidate; if no candidate meets the gate, of the one that misses it least.
        passed: whether the selected candidate meets the gate.
        reasons: sentences about the gate's conditions.
        why: the selection rule, in one sentence.
        checks: the gate's conditions for each eligible candidate.
    """

    selected: str
    passed: bool
    reasons: list[str]
    why: str
    checks: dict[str, list[Check]]


def pareto(candidates: Sequence[Measured]) -> set[str]:
    """Returns the ids of the candidates on the Pareto front of task score and forgetting.

    Equal candidates do not dominate each other. A candidate without a task score is never on the front.
    """
    points = {one.id: (one.task_score.value, -one.delta_bpb.value) for one in candidates if one.task_score is not None}
    return {
        name
        for name, point in points.items()
        if not any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points.values())
    }


def decide(
    candidates: Sequence[Measured],
    gate: Gate,
    metric: str,
    difference: Callable[[str, str], Value],
    trivial_name: str = "the trivial answer",
) -> Decision:
    """Applies the gate to every candidate and selects one by the gate's rule.

    Ties are resolved by the other quantity, then by the order of the candidates.

    Args:
        candidates: measurements on the dev split; must include `finetuned`.
        gate: conditions and rule.
        metric: name of the task's main metric, for the sentences.
        difference: returns the paired difference of the task scores of two candidates, given by their ids.
        trivial_name: name of the best trivial answer, for the sentences.
    """
    finetuned = next(one for one in candidates if one.kind == "finetuned")
    eligible = [one for one in candidates if one.kind in ELIGIBLE and not one.replicate]
    champion = any(one.kind == "champion" and one.task_score is not None for one in candidates)
    checks = {one.id: check(one, finetuned, gate, metric, champion, trivial_name) for one in eligible}
    meeting = [one for one in eligible if all(item.passed for item in checks[one.id])]
    if meeting:
        best, why = _select(meeting, len(eligible), gate.rule, metric, difference)
        sentences = [item.sentence for item in checks[best.id]]
        return Decision(best.id, True, [*sentences, why], why, checks)
    best = min(eligible, key=lambda one: (_distance(one, eligible, checks), *_by_score(one)))
    failed = [item.sentence for item in checks[best.id] if not item.passed]
    why = (
        f"none of the {len(eligible)} candidates meets the gate; it misses by least in total, each miss measured against how "
        "far the candidates lie apart"
    )
    return Decision(best.id, False, [f"{best.id}: {sentence}" for sentence in failed], why, checks)


def check(
    one: Measured,
    finetuned: Measured,
    gate: Gate,
    metric: str,
    champion: bool = False,
    trivial_name: str = "the trivial answer",
) -> list[Check]:
    """Returns the gate's conditions for one candidate, in the order of the options.

    Args:
        champion: whether there is a champion with a task score to compare with.
        trivial_name: name of the best trivial answer, for the sentences.
    """
    checks = [_score_drop(one, gate.max_score_drop, metric)]
    if gate.beat_trivial and finetuned.task_score_vs_trivial is not None:
        checks.append(_beats_trivial(one, finetuned.task_score_vs_trivial, trivial_name, metric))
    if champion:
        name, limit = "max_score_drop_vs_champion", gate.drop_vs_champion
        checks.append(_no_worse(name, one, one.task_score_vs_champion, "the champion", limit, metric))
    if gate.min_task_score is not None:
        checks.append(_lowest_score(one, gate.min_task_score, metric))
    forgets = one.delta_bpb.value
    if gate.max_forgetting is not None:
        limit = gate.max_forgetting
        sentence = f"it forgets {forgets:.3f} bits per byte; at most {limit:g} is accepted"
        checks.append(Check("max_forgetting", forgets <= limit, max(0.0, forgets - limit), sentence))
    if gate.max_forgetting_share is not None:
        limit = share_limit(finetuned.delta_bpb, gate.max_forgetting_share)
        sentence = _share_sentence(forgets, finetuned.delta_bpb, gate.max_forgetting_share, limit)
        checks.append(Check("max_forgetting_share", forgets <= limit, max(0.0, forgets - limit), sentence))
    if gate.max_capability_drop is not None:
        checks.append(_keeps_capabilities(one.capabilities, gate.max_capability_drop))
    return checks


def _keeps_capabilities(changes: Mapping[str, tuple[float, float]], max_drop: float) -> Check:
    name = "max_capability_drop"
    if not changes:
        return Check(name, False, 1.0, "no task was measured on it whose score is a mean over examples")
    worst = min(changes, key=lambda task: changes[task][0])
    change, error = changes[worst]
    sentence = (
        f"of {len(changes)} capabilities it lost most in {worst}: {change:+.3f} ± {error:.3f} (standard error) against the "
        f"pretrained model; a drop of at most {max_drop:g} is accepted"
    )
    return Check(name, change >= -max_drop, max(0.0, -max_drop - change), sentence)


def measurably_forgets(delta_bpb: Value) -> bool:
    """Tells whether the interval of the forgetting is above zero."""
    return delta_bpb.low > 0


def share_limit(finetuned: Value, share: float) -> float:
    """Returns the maximum forgetting that `max_forgetting_share` accepts, in bits per byte.

    If `finetuned` does not measurably forget, a share of its forgetting is meaningless (a negative value would even demand an
    improvement). A candidate may then forget as much as the upper end of the interval of `finetuned`, and at least 0.
    """
    return share * finetuned.value if measurably_forgets(finetuned) else max(0.0, finetuned.high)


def _score_drop(one: Measured, max_drop: float, metric: str) -> Check:
    if one.kind == "finetuned" and one.task_score_vs_finetuned is not None:
        return Check("max_score_drop", True, 0.0, f"its {metric} is what the others are held against")
    return _no_worse("max_score_drop", one, one.task_score_vs_finetuned, "fine-tuning alone", max_drop, metric)


def learned_something(vs_trivial: Value) -> bool:
    """Tells whether a score is measurably higher than that of the best trivial answer."""
    return vs_trivial.low > 0


def _beats_trivial(one: Measured, finetuned: Value, trivial_name: str, metric: str) -> Check:
    ours = one.task_score_vs_trivial
    if ours is None:
        return Check("beat_trivial", False, 1.0, f"it has no {metric}, since it was not trained on the task")
    if not learned_something(finetuned):
        sentence = (
            f"nothing was learned: the {metric} of fine-tuning alone against {trivial_name} is {signed(finetuned)}; the lower "
            "end is not above 0"
        )
        return Check("beat_trivial", False, -min(finetuned.low, ours.low, 0.0), sentence)
    passed = learned_something(ours)
    verb = "is" if passed else "is not"
    sentence = f"its {metric} against {trivial_name} is {signed(ours)}; the lower end {verb} above 0"
    return Check("beat_trivial", passed, 0.0 if passed else -ours.low, sentence)


def examples_needed(difference: Value, max_drop: float, examples: int) -> int | None:
    """Estimates how many examples would tell that a measured drop is within the accepted one.

    The width of an interval falls with the square root of the number of examples.

    Returns:
        The number, to two digits; None if more examples would not help, since the measured drop itself is not accepted.
    """
    margin = difference.value + max_drop
    if margin <= 0 or difference.low > -max_drop or not examples:
        return None
    return two_digits(examples * ((difference.value - difference.low) / margin) ** 2)


def two_digits(number: float) -> int:
    """Rounds a number of examples up to two digits."""
    digits = 10 ** max(0, math.floor(math.log10(number)) - 1) if number > 0 else 1
    return math.ceil(number / digits) * digits


def _no_worse(name: str, one: Measured, difference: Value | None, other: str, max_drop: float, metric: str) -> Check:
    if difference is None:
        return Check(name, False, 1.0, f"it has no {metric}, since it was not trained on the task")
    # Identical predictions pass even if no drop is accepted.
    passed = difference.low > -max_drop or difference == Value(0.0, 0.0, 0.0)
    verb = "is" if passed else "is not"
    limit = f"{-max_drop:g}" if max_drop else "0"
    sentence = f"its {metric} against {other} is {signed(difference)}; the lower end {verb} above {limit}"
    if not passed and (needed := examples_needed(difference, max_drop, one.examples)) is not None:
        sentence += f"; {one.examples:,} examples are too few to tell, about {needed:,} are needed"
    return Check(name, passed, 0.0 if passed else -max_drop - difference.low, sentence)


def _lowest_score(one: Measured, lowest: float, metric: str) -> Check:
    if one.task_score is None:
        return Check("min_task_score", False, 1.0, f"it has no {metric}, and at least {lowest:g} is asked for")
    score = one.task_score.value
    sentence = f"its {metric} is {score:.3f}; at least {lowest:g} is asked for"
    return Check("min_task_score", score >= lowest, max(0.0, lowest - score), sentence)


def _share_sentence(forgets: float, finetuned: Value, share: float, limit: float) -> str:
    if measurably_forgets(finetuned) and forgets <= 0:
        return (
            f"it forgets nothing ({forgets:+.3f} bits per byte, fine-tuning alone {finetuned.value:+.3f}); at most "
            f"{100 * share:.0f} % of that is accepted"
        )
    if measurably_forgets(finetuned):
        amounts = f"{forgets:.3f} of {finetuned.value:.3f} bits per byte"
        return (
            f"it forgets {100 * forgets / finetuned.value:.0f} % of what fine-tuning alone does ({amounts}); at most "
            f"{100 * share:.0f} % is accepted"
        )
    return (
        f"fine-tuning alone does not measurably forget ({signed(finetuned)} bits per byte), so up to {limit:.3f} is accepted; "
        f"it forgets {forgets:.3f}"
    )


def signed(value: Value) -> str:
    """Formats a difference with its sign and interval."""
    return value_text(value.to_json())


def _by_score(one: Measured) -> tuple[float, float]:
    """Returns the sort key for the best task score; smaller is better."""
    score = one.task_score.value if one.task_score is not None else float("-inf")
    return -score, one.delta_bpb.value


def _by_forgetting(one: Measured) -> tuple[float, float]:
    """Returns the sort key for the least forgetting; smaller is better."""
    return _by_score(one)[::-1]


def _select(
    meeting: Sequence[Measured], eligible: int, rule: str, metric: str, difference: Callable[[str, str], Value]
) -> tuple[Measured, str]:
    """Selects one of the candidates that meet the gate. Returns it with the reason."""
    best = min(meeting, key=_by_score)
    if len(meeting) == 1:
        return (
            best,
            f"it is the only one of {eligible} candidates that meets the gate" if eligible > 1 else "it meets the gate",
        )
    those = f"of the {len(meeting)} candidates (out of {eligible}) that meet the gate, "
    if rule == "best_task_score":
        return best, f"{those}it has the best {metric}"
    if rule == "least_forgetting":
        return min(meeting, key=_by_forgetting), f"{those}it forgets least"
    as_good = [one for one in meeting if one is best or difference(one.id, best.id).high >= 0]
    if len(as_good) == 1:
        return best, f"{those}it has the best {metric}, measurably above that of the others"
    why = f"{those}{len(as_good)} are not measurably below the best in {metric}; of these it forgets least"
    return min(as_good, key=_by_forgetting), why


def _distance(one: Measured, eligible: Sequence[Measured], checks: dict[str, list[Check]]) -> float:
    """Returns the sum of a candidate's misses. The candidates' ranges normalise misses of score and forgetting."""
    total = 0.0
    for number, item in enumerate(checks[one.id]):
        if item.passed:
            continue
        widest = max(checks[other.id][number].miss for other in eligible)
        narrowest = min(checks[other.id][number].miss for other in eligible)
        spread = widest - narrowest
        total += item.miss / spread if spread > 0 else 1.0
    return total
