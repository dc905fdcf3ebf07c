"""Converts model outputs for labelled examples to result rows, one for each example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..shared.config import Task
from ..shared.data.prepared import Documents
from ..shared.data.records import GROUP
from ..shared.serving.answers import ContextWindow, answer
from ..shared.serving.decoding import predicted_label, predicted_labels
from ..shared.task_kinds import TASK_KINDS, Target
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
    text = " — ".join(record[role] for role in TASK_KINDS[kind].inputs)
    return {
        "id": record["id"],
        "reference": reference,
        "prediction": prediction,
        "score": score,
        "contaminated": bool(record.get("contaminated", False)),
        **({GROUP: record[GROUP]} if GROUP in record else {}),
        "text": text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…",
    }


def from_head(
    kind: Task, metric: str, labels: Sequence[str], examples: Documents, logits: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """Returns rows with the task head's predictions; a prediction is None if a logit is not finite.

    Args:
        labels: label names, in the order of the logits.
        examples: examples with their references.
        logits: logits of each example, as `head_logits` returns them.
    """
    return _FROM_HEAD[TASK_KINDS[kind].target](kind, metric, labels, examples, logits)


def _one_by_one(
    reference: Callable[[Sequence[str], Documents, int], Label],
    prediction: Callable[[Sequence[str], np.ndarray], tuple[Label, list[float]]],
    kind: Task,
    metric: str,
    labels: Sequence[str],
    examples: Documents,
    logits: Sequence[np.ndarray],
) -> list[dict[str, Any]]:
    """Returns a row for each document.

    Args:
        reference: returns the reference of a document, from the label names and its index.
        prediction: returns the prediction, and the probability of each label if there are labels.
    """
    rows = []
    for index, record in enumerate(examples.records()):
        values = logits[index].astype(np.float64)
        given, shares = prediction(labels, values) if np.isfinite(values).all() else (None, None)
        row = example_row(record, kind, metric, reference(labels, examples, index), given)
        rows.append({**row, "probabilities": shares} if labels else row)
    return rows


def _true_label(labels: Sequence[str], examples: Documents, index: int) -> Label:
    return labels[int(examples.labels[index])]


def _true_labels(labels: Sequence[str], examples: Documents, index: int) -> Label:
    return [label for label, target in zip(labels, examples.targets[index], strict=True) if target > 0.5]


def _true_number(_: Sequence[str], examples: Documents, index: int) -> Label:
    return float(examples.targets[index, 0])


def _predicted_number(_: Sequence[str], logits: np.ndarray) -> tuple[Label, list[float]]:
    return float(logits[0]), []


def _answers(
    kind: Task, metric: str, _: Sequence[str], examples: Documents, logits: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """Returns one row for each example, combining the windows over its context."""
    records = examples.records()
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
        row = example_row(record, kind, metric, list(first["answers"]), found.text)
        rows.append({**row, "span_score": found.span_score, "null_score": found.null_score})
    return rows


_FROM_HEAD: dict[Target, Callable[..., list[dict[str, Any]]]] = {
    "label": partial(_one_by_one, _true_label, predicted_label),
    "labels": partial(_one_by_one, _true_labels, predicted_labels),
    "number": partial(_one_by_one, _true_number, _predicted_number),
    "answers": _answers,
}
