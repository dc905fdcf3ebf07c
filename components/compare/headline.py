"""Summarises a comparison in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..shared.value_text import value_text
from .config import Gate
from .evaluations import Candidate, Evaluations
from .names import candidate_name, metric_name
from .scores import Scores, forgetting_share
from .seeds import seeds_sentence
from .selection import Decision, learned_something
from .statistics import Value


def headline(
    selected: Candidate,
    evaluations: Evaluations,
    scores: dict[str, dict[str, Scores]],
    decision: Decision,
    gate: Gate,
    seeds: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Describes the selected candidate's results on test. Says so if the gate is not met.

    If the candidate and fine-tuning alone were trained with several seeds, their means over the seeds are compared.

    Args:
        seeds: result of `over_seeds`.
    """
    ours, finetuned = scores[selected.id]["test"], scores[evaluations.of_kind("finetuned").id]["test"]
    parts = []
    means = seeds_sentence(seeds, selected.id, metric_name(evaluations.task.metric))
    if means is not None:
        parts.append(means)
    elif ours.task_score is not None:
        value = ours.task_score
        parts.append(f"{metric_name(evaluations.task.metric)} {value_text(value.to_json(), 2, signed=False)}")
    if means is not None:
        pass
    elif selected.entry.kind == "finetuned":
        parts.append(f"forgetting {_bits(ours.delta_bpb)}")
    else:
        if ours.task_score_vs_finetuned is not None:
            parts.append(_against(ours.task_score_vs_finetuned, gate.max_score_drop, "fine-tuning alone"))
        parts.append(_with_forgetting(ours, finetuned))
    if ours.task_score_vs_champion is not None:
        parts.append(_against(ours.task_score_vs_champion, gate.drop_vs_champion, "the champion"))
    sentence = f"{candidate_name(selected.entry)}: {', '.join(parts)}"
    if decision.passed:
        return sentence
    vs_trivial = scores[evaluations.of_kind("finetuned").id]["dev"].task_score_vs_trivial
    if gate.beat_trivial and vs_trivial is not None and not learned_something(vs_trivial):
        return f"Nothing was learned, so the gate is not met; nearest comes {sentence}"
    return f"The gate is not met; nearest comes {sentence}"


def _against(difference: Value, max_drop: float, other: str) -> str:
    if difference == Value(0.0, 0.0, 0.0):
        return f"exactly as good as {other}"
    if difference.low > 0:
        return f"{difference.value:+.2f} on {other}"
    if difference.high < 0:
        return f"{difference.value:.2f} against {other}"
    if difference.low > -max_drop:
        return f"as good as {other} within {max_drop:g}"
    return f"{value_text(difference.to_json(), 2)} against {other}"


def _with_forgetting(ours: Scores, finetuned: Scores) -> str:
    share = forgetting_share(ours, finetuned)
    if share is None:
        return f"forgetting {_bits(ours.delta_bpb)}, where fine-tuning alone does not measurably forget"
    if share <= 0:
        return "with none of its forgetting"
    return f"with {100 * share:.0f} % of its forgetting"


def _bits(value: Value) -> str:
    return f"{value_text(value.to_json(), 2, signed=False)} bits per byte"
