"""The gate, the choice among the candidates that meet it, and the Pareto front. Pure functions of measured values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..shared.value_text import value_text
from .config import Gate
from .statistics import Value

ELIGIBLE = ("finetuned", "mixed", "interpolated")
"""Kinds of candidates that can be selected."""


@dataclass(frozen=True)
class Measured:
    """What selection knows of a candidate.

    Attributes:
        task_score: None where the model has no trained head.
        task_score_vs_finetuned: paired difference, None likewise.
        delta_bpb: forgetting.
        task_score_vs_champion: paired difference; None also where there is no champion with a task score.
        replicate: whether it is another candidate again, with a further seed; such a one is not selected, since the best of
            several seeds is the luckiest.
    """

    id: str
    kind: str
    task_score: Value | None
    task_score_vs_finetuned: Value | None
    delta_bpb: Value
    task_score_vs_champion: Value | None = None
    replicate: bool = False


@dataclass(frozen=True)
class Hypervolume:
    """How much a set of candidates reaches.

    Attributes:
        value: area, score times bits per byte, that at least one of them is no worse in than the reference point is.
        task_score: the reference point's score.
        forgetting: the reference point's forgetting, in bits per byte.
    """

    value: float
    task_score: float
    forgetting: float


@dataclass(frozen=True)
class Check:
    """One condition of the gate, held against one candidate.

    Attributes:
        name: the option that asks for it.
        passed: whether the candidate meets it.
        miss: by how much it does not, in the measured quantity's unit; 0 where it does.
        sentence: what was measured and what is asked for, in plain words.
    """

    name: str
    passed: bool
    miss: float
    sentence: str


@dataclass(frozen=True)
class Decision:
    """What was selected and why.

    Attributes:
        selected: id of the candidate; where none meets the gate, of the one that comes nearest.
        passed: whether it meets the gate.
        reasons: plain sentences.
        why: the rule that led to it, in one sentence.
        checks: the gate's conditions for each eligible candidate.
    """

    selected: str
    passed: bool
    reasons: list[str]
    why: str
    checks: dict[str, list[Check]]


def pareto(candidates: Sequence[Measured]) -> set[str]:
    """Ids of the candidates that no other one beats, in score or in forgetting without being worse in the other.

    Equal candidates do not beat each other. A candidate with no task score is never on the front.
    """
    points = {one.id: (one.task_score.value, -one.delta_bpb.value) for one in candidates if one.task_score is not None}
    return {
        name
        for name, point in points.items()
        if not any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points.values())
    }


def hypervolume(candidates: Sequence[Measured], of: Sequence[Measured] | None = None) -> Hypervolume | None:
    """Area between the Pareto front and the worst of both, exact in two dimensions.

    E. Zitzler and L. Thiele, Multiobjective optimization using evolutionary algorithms (1998). One front with more area than
    another reaches more; areas compare only with the same reference point.

    Args:
        candidates: give the reference point: the lowest task score and the highest forgetting of those with a task score.
        of: those whose front it is; all of them without it.

    Returns:
        None where no candidate has a task score.
    """
    scored = [(one.task_score.value, one.delta_bpb.value) for one in candidates if one.task_score is not None]
    if not scored:
        return None
    lowest, most = min(score for score, _ in scored), max(forgets for _, forgets in scored)
    area, reached = 0.0, lowest
    points = [(one.delta_bpb.value, one.task_score.value) for one in of or candidates if one.task_score is not None]
    for forgets, score in sorted(points):
        if score > reached:
            area += (score - reached) * (most - forgets)
            reached = score
    return Hypervolume(area, lowest, most)


def decide(candidates: Sequence[Measured], gate: Gate, metric: str) -> Decision:
    """Holds every candidate against the gate and selects one by the gate's rule.

    Ties go to the better one in the other quantity, then to the one that stands first.

    Args:
        candidates: measured on the dev split, `finetuned` among them.
        gate: conditions and rule.
        metric: name of the task's main metric, for the sentences.
    """
    finetuned = next(one for one in candidates if one.kind == "finetuned")
    eligible = [one for one in candidates if one.kind in ELIGIBLE and not one.replicate]
    champion = any(one.kind == "champion" and one.task_score is not None for one in candidates)
    checks = {one.id: check(one, finetuned, gate, metric, champion) for one in eligible}
    meeting = [one for one in eligible if all(item.passed for item in checks[one.id])]
    if meeting:
        best = min(meeting, key=lambda one: _preference(one, gate.rule))
        sentences = [item.sentence for item in checks[best.id]]
        why = _why(len(meeting), len(eligible), gate.rule, metric)
        return Decision(best.id, True, [*sentences, why], why, checks)
    best = min(eligible, key=lambda one: (_distance(one, eligible, checks), *_preference(one, gate.rule)))
    failed = [item.sentence for item in checks[best.id] if not item.passed]
    why = (
        f"none of the {len(eligible)} candidates meets the gate; it misses by least in total, each miss measured against how "
        "far the candidates lie apart"
    )
    return Decision(best.id, False, [f"{best.id}: {sentence}" for sentence in failed], why, checks)


def check(one: Measured, finetuned: Measured, gate: Gate, metric: str, champion: bool = False) -> list[Check]:
    """The gate's conditions for one candidate, in the order of the options.

    Args:
        champion: whether there is a champion with a task score to hold it against.
    """
    checks = [_score_drop(one, gate.max_score_drop, metric)]
    if champion:
        name, limit = "max_score_drop_vs_champion", gate.drop_vs_champion
        checks.append(_no_worse(name, one.task_score_vs_champion, "the champion", limit, metric))
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
    return checks


def measurably_forgets(delta_bpb: Value) -> bool:
    """Whether the interval of the forgetting lies above zero."""
    return delta_bpb.low > 0


def share_limit(finetuned: Value, share: float) -> float:
    """Most forgetting that `max_forgetting_share` accepts, in bits per byte.

    Where fine-tuning alone does not measurably forget, a share of it means nothing (of a negative number it would even ask
    for improvement). A candidate may then forget as much as fine-tuning alone still might: the upper end of its interval,
    and in any case nothing, 0.
    """
    return share * finetuned.value if measurably_forgets(finetuned) else max(0.0, finetuned.high)


def _score_drop(one: Measured, max_drop: float, metric: str) -> Check:
    if one.kind == "finetuned" and one.task_score_vs_finetuned is not None:
        return Check("max_score_drop", True, 0.0, f"its {metric} is what the others are held against")
    return _no_worse("max_score_drop", one.task_score_vs_finetuned, "fine-tuning alone", max_drop, metric)


def _no_worse(name: str, difference: Value | None, other: str, max_drop: float, metric: str) -> Check:
    if difference is None:
        return Check(name, False, 1.0, f"it has no {metric}, since it was not trained on the task")
    # What predicts exactly the same is no worse, also where no drop at all is accepted.
    passed = difference.low > -max_drop or difference == Value(0.0, 0.0, 0.0)
    verb = "is" if passed else "is not"
    limit = f"{-max_drop:g}" if max_drop else "0"
    sentence = f"its {metric} against {other} is {signed(difference)}; the lower end {verb} above {limit}"
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
    """A difference with its interval."""
    return value_text(value.to_json())


def _preference(one: Measured, rule: str) -> tuple[float, float]:
    """Smaller is better."""
    score = one.task_score.value if one.task_score is not None else float("-inf")
    forgets = one.delta_bpb.value
    return (forgets, -score) if rule == "least_forgetting" else (-score, forgets)


def _why(meeting: int, eligible: int, rule: str, metric: str) -> str:
    best = "forgets least" if rule == "least_forgetting" else f"has the best {metric}"
    if meeting == 1:
        return (
            f"it is the only one of {eligible} candidates that meets the gate" if eligible > 1 else "it meets the gate"
        )
    return f"of the {meeting} candidates (out of {eligible}) that meet the gate, it {best}"


def _distance(one: Measured, eligible: Sequence[Measured], checks: dict[str, list[Check]]) -> float:
    """Sum of a candidate's misses; a score's and a forgetting's miss are made comparable by the candidates' ranges."""
    total = 0.0
    for number, item in enumerate(checks[one.id]):
        if item.passed:
            continue
        widest = max(checks[other.id][number].miss for other in eligible)
        narrowest = min(checks[other.id][number].miss for other in eligible)
        spread = widest - narrowest
        total += item.miss / spread if spread > 0 else 1.0
    return total
