"""Test examples for the report: predictions side by side, and confusions between classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from .evaluations import Candidate, EvaluatedTask, Evaluations
from .targets import shown

SAMPLES = 6
MATRIX_LABELS = 20
"""Maximum number of labels for a confusion matrix. With more labels the report lists the most frequent confusions."""
PAIRS = 15


def samples(evaluations: Evaluations, selected: Candidate) -> list[dict[str, Any]]:
    """Returns test examples with predictions side by side. Disagreements of the selected candidate and `finetuned` come first.

    In regression, examples with the largest disagreement come first. `pretrained` is None if that model has no score.
    """
    task, rows = evaluations.task, {"selected": _rows(selected)}
    for kind in ("finetuned", "pretrained"):
        rows[kind] = _rows(evaluations.of_kind(kind))
    places = list(range(min(len(rows["selected"]), len(rows["finetuned"]))))

    def agreement(place: int) -> float:
        ours, theirs = (rows[who][place]["prediction"] for who in ("selected", "finetuned"))
        return -shown(task.kind).disagreement(ours, theirs)

    return [
        {
            "id": rows["selected"][place]["id"],
            "text": rows["selected"][place].get("text", ""),
            "reference": rows["selected"][place]["reference"],
            **{
                who: {name: rows[who][place][name] for name in ("prediction", "score")} if rows[who] else None
                for who in ("pretrained", "finetuned", "selected")
            },
        }
        for place in sorted(places, key=agreement)[:SAMPLES]
    ]


def confusion(task: EvaluatedTask, selected: Candidate) -> dict[str, Any] | None:
    """Counts how often a class (row) was predicted as a class (column) on test; None if the task has no classes.

    Returns:
        `{candidate, labels, counts}`, or with many labels `{candidate, labels, pairs, others}`: the most frequent confusions,
        and the number of all other confusions.
    """
    rows = _rows(selected)
    if not shown(task.kind).has_classes or not rows:
        return None
    counts = Counter((row["reference"], row["prediction"]) for row in rows)
    labels = list(dict.fromkeys([*(task.labels or []), *sorted({label for pair in counts for label in pair})]))
    found: dict[str, Any] = {"candidate": selected.id, "labels": labels}
    if len(labels) <= MATRIX_LABELS:
        return {**found, "counts": [[counts[truth, given] for given in labels] for truth in labels]}
    wrong = sorted(
        ((count, pair) for pair, count in counts.items() if pair[0] != pair[1]), key=lambda one: (-one[0], one[1])
    )
    pairs = [{"reference": truth, "prediction": given, "examples": count} for count, (truth, given) in wrong[:PAIRS]]
    return {**found, "pairs": pairs, "others": sum(count for count, _ in wrong[PAIRS:])}


def _rows(one: Candidate) -> Sequence[dict[str, Any]]:
    return one.splits["test"].examples or []
