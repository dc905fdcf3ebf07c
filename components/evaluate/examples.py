"""Converts model outputs for labelled examples to result rows, one for each example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..shared.config import Task
from ..shared.data.prepared import Documents
from .answers import ContextWindow, answer
from .scores import Label, example_score

SHOWN_CHARACTERS = 400


def example_row(
    record: dict[str, Any],
    kind: Task,
    metric: str,
    reference: Label,
    prediction: Label | None,
    scores: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Returns a row of <split>.examples.jsonl. A prediction of None has no score.

    Args:
        scores: scores of this example by metric, if they are already computed.
    """
    score = None
    if prediction is not None:
        known = (scores or {}).get(metric)
        score = example_score(kind, metric, prediction, reference) if known is None else known
    text = record.get("prompt") or record.get("text") or ""
    if kind == "question_answering":
        text = f"{record['question']} — {record['context']}"
    return {
        "id": record["id"],
        "reference": reference,
        "prediction": prediction,
        "score": score,
        "contaminated": bool(record.get("contaminated", False)),
        "text": text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…",
    }


def from_head(
    kind: Task, metric: str, labels: Sequence[str], examples: Documents, logits: Mapping[int, np.ndarray]
) -> list[dict[str, Any]]:
    """Returns rows with the task head's predictions; a prediction is None if a logit is not finite.

    Args:
        labels: label names, in the order of the logits.
        examples: examples with their references.
        logits: logits by index in `examples`, as `head_logits` returns them.
    """
    records = examples.records()
    if kind == "question_answering":
        return _answers(metric, records, logits)
    rows = []
    for index, record in enumerate(records):
        values = logits[index].astype(np.float64)
        reference = _reference(kind, labels, examples, index)
        given, shares = _prediction(kind, labels, values) if np.isfinite(values).all() else (None, None)
        row = example_row(record, kind, metric, reference, given)
        rows.append(row if kind == "regression" else {**row, "probabilities": shares})
    return rows


def _reference(kind: Task, labels: Sequence[str], examples: Documents, index: int) -> Label:
    if kind == "classification":
        return labels[int(examples.labels[index])]
    if kind == "regression":
        return float(examples.targets[index, 0])
    return [label for label, target in zip(labels, examples.targets[index], strict=True) if target > 0.5]


def _prediction(kind: Task, labels: Sequence[str], logits: np.ndarray) -> tuple[Label, list[float]]:
    """Returns the prediction and the probability of each label."""
    if kind == "regression":
        return float(logits[0]), []
    if kind == "classification":
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        given: Label = labels[int(np.argmax(shares))]
    else:
        shares = np.exp(-np.logaddexp(0, -logits))  # logistic function without overflow
        given = [label for label, share in zip(labels, shares, strict=True) if share > 0.5]
    return given, [round(float(share), 6) for share in shares]


def _answers(metric: str, records: Sequence[dict[str, Any]], logits: Mapping[int, np.ndarray]) -> list[dict[str, Any]]:
    """Returns one row for each example, combining the windows over its context."""
    windows: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        windows.setdefault(record["id"], []).append(index)
    rows = []
    for indices in windows.values():
        first = records[indices[0]]
        found = answer(
            [ContextWindow(logits[i], records[i]["context_from"], records[i]["offsets"]) for i in indices],
            first["context"],
        )
        record = {**first, "contaminated": any(records[i].get("contaminated") for i in indices)}
        row = example_row(record, "question_answering", metric, list(first["answers"]), found.text)
        rows.append({**row, "span_score": found.span_score, "null_score": found.null_score})
    return rows
