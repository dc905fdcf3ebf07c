"""Values of a candidate on one split with intervals, both absolute and relative to other candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..shared.data.records import GROUP
from ..shared.metrics import split_statistic
from .evaluations import Candidate, EvaluatedTask, Evaluations
from .selection import measurably_forgets
from .statistics import Bootstrap, Value, clusters

EXTRA_METRICS = (
    *("nats_per_token", "accuracy", "macro_f1", "micro_f1", "exact_match", "token_f1", "completion_nats_per_token"),
    *("rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "pearson", "spearman", "mae", "rmse", "calibration_error"),
)
PAIRED_BY = {
    "task_score_vs_pretrained": "examples",
    "task_score_vs_champion": "examples",
    "delta_bpb_vs_champion": "documents",
}
"""Differences whose results include the number of pairs, and the unit of the pairs."""


@dataclass(frozen=True)
class Scores:
    """The values of one candidate on one split."""

    bpb: Value
    delta_bpb: Value
    task_score: Value | None
    task_score_vs_finetuned: Value | None
    task_score_clean: Value | None
    """Task score without contaminated examples."""
    task_score_vs_pretrained: Value | None
    task_score_vs_champion: Value | None
    task_score_vs_trivial: Value | None
    """Difference to the best trivial answer."""
    delta_bpb_vs_champion: Value | None
    counts: dict[str, int]
    """Numbers of documents and examples that differences are paired by."""
    extra: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Returns the values in the format of `report.json`."""
        values: dict[str, Any] = {
            name: value.to_json() if isinstance(value, Value) else None
            for name, value in vars(self).items()
            if name not in ("extra", "counts")
        }
        for name, what in PAIRED_BY.items():
            if values[name] is not None:
                values[name][what] = self.counts[what]
        return {**values, **self.extra}


def score_candidate(candidate: Candidate, evaluations: Evaluations, split: str, draw: Bootstrap) -> Scores:
    """Scores a candidate on one split, both absolute and relative to the others."""
    ours = candidate.splits[split]
    before = evaluations.of_kind("pretrained").splits[split]
    champion = evaluations.champion()
    in_use = champion.splits[split] if champion else None
    finetuned = evaluations.of_kind("finetuned").splits[split]
    others = {
        "finetuned": finetuned.examples,
        "pretrained": before.examples,
        "champion": in_use.examples if in_use else None,
        "trivial": finetuned.trivial,
    }
    score = clean = None
    differences: dict[str, Value] = {}
    if ours.examples:
        task = evaluations.task
        score = _task_score(task, ours.examples, draw)
        differences = {
            kind: task_difference(task, ours.examples, other, draw) for kind, other in others.items() if other
        }
        uncontaminated = [row for row in ours.examples if not row.get("contaminated")]
        if len(uncontaminated) == len(ours.examples):
            clean = score
        elif uncontaminated:
            clean = _task_score(task, uncontaminated, draw)
    summary = candidate.entry.splits.get(split, {})
    return Scores(
        bpb=draw.bits_per_byte(ours.nats, ours.num_bytes, ours.groups),
        delta_bpb=draw.forgetting(ours.nats, before.nats, ours.num_bytes, ours.groups),
        task_score=score,
        task_score_vs_finetuned=differences.get("finetuned"),
        task_score_clean=clean,
        task_score_vs_pretrained=differences.get("pretrained"),
        task_score_vs_champion=differences.get("champion"),
        task_score_vs_trivial=differences.get("trivial"),
        delta_bpb_vs_champion=draw.forgetting(ours.nats, in_use.nats, ours.num_bytes, ours.groups) if in_use else None,
        counts={"documents": len(ours.documents), "examples": len(ours.examples or [])},
        extra={name: summary[name] for name in EXTRA_METRICS if summary.get(name) is not None},
    )


def _task_score(task: EvaluatedTask, examples: Sequence[dict[str, Any]], draw: Bootstrap) -> Value:
    metric = split_statistic(task.metric, examples)
    groups = example_groups(examples)
    return draw.mean(_per_example(examples), groups) if metric is None else draw.of_split(metric, len(examples), groups)


def task_difference(
    task: EvaluatedTask, examples: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], draw: Bootstrap
) -> Value:
    """Computes the difference of the task score between two sets of predictions for the same examples."""
    if all(mine["prediction"] == other["prediction"] for mine, other in zip(examples, baseline, strict=True)):
        return Value(0.0, 0.0, 0.0)  # exact, without rounding errors
    ours, theirs = split_statistic(task.metric, examples), split_statistic(task.metric, baseline)
    if ours is None or theirs is None:
        return draw.mean_difference(_per_example(examples), _per_example(baseline), example_groups(examples))
    return draw.difference(ours, theirs, len(examples), example_groups(examples))


def example_groups(examples: Sequence[dict[str, Any]]) -> np.ndarray | None:
    """Returns the number of the group of each example, such as its author; None if the data names no groups."""
    return clusters([row.get(GROUP) for row in examples])


def _per_example(examples: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([row["score"] for row in examples], np.float64)


def forgetting_share(ours: Scores, finetuned: Scores) -> float | None:
    """Returns forgetting as a share of the forgetting of `finetuned`; None if `finetuned` does not measurably forget."""
    if not measurably_forgets(finetuned.delta_bpb):
        return None
    return ours.delta_bpb.value / finetuned.delta_bpb.value
