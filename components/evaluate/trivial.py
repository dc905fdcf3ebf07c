"""Trivial answers: what a program that read no input could answer. A model that learned something scores higher.

They are made from the references of the split itself, so that they are at least as good as any made from training data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..shared.config import Task
from ..shared.task_kinds import TASK_KINDS
from .scores import Label, example_score, split_scores
from .texts import Overlap


@dataclass(frozen=True)
class TrivialAnswer:
    """The best trivial answer to a split.

    Attributes:
        name: description, such as `the most frequent label`.
        score: the task's main metric over the split.
        rows: id, reference, prediction and scores of each example.
    """

    name: str
    score: float
    rows: list[dict[str, Any]]


def best_trivial_answer(
    kind: Task,
    metric: str,
    examples: Sequence[Mapping[str, Any]],
    prompts: Mapping[str, str],
    overlap: Overlap | None,
) -> TrivialAnswer:
    """Returns the trivial answer with the highest score; of equal ones the first.

    Args:
        kind: the task.
        metric: the task's main metric.
        examples: at least one example, with `id` and `reference`.
        prompts: prompts by id, for generation.
        overlap: scorer of generated texts; None for tasks with a head.
    """
    references = [row["reference"] for row in examples]
    found = []
    for name, predictions in _PREDICTIONS[TASK_KINDS[kind].target](
        references, [prompts.get(row["id"], "") for row in examples]
    ):
        rows = []
        for row, prediction in zip(examples, predictions, strict=True):
            reference = row["reference"]
            scores = overlap.of_example(prediction, reference) if overlap and isinstance(prediction, str) else {}
            score = scores.get(metric)
            if score is None:
                score = example_score(kind, metric, prediction, reference)
            rows.append({"id": row["id"], "reference": reference, "prediction": prediction, "score": score, **scores})
        value = split_scores(kind, rows)[metric]
        found.append(TrivialAnswer(name, float(value or 0.0), rows))
    return max(found, key=lambda answer: answer.score)


def _of_label(references: Sequence[Any], _: Sequence[str]) -> list[tuple[str, list[Label]]]:
    return [("the most frequent label", [_most_frequent(references)] * len(references))]


def _of_labels(references: Sequence[Any], _: Sequence[str]) -> list[tuple[str, list[Label]]]:
    """F1 of a constant prediction is highest for the k most frequent labels, for some k."""
    counts = Counter(label for labels in references for label in labels)
    ranked = sorted(counts, key=lambda label: (-counts[label], label))
    sets = [ranked[:size] for size in range(1, len(ranked) + 1)] or [[]]
    return [("the most frequent labels", [labels] * len(references)) for labels in sets]


def _of_number(references: Sequence[Any], _: Sequence[str]) -> list[tuple[str, list[Label]]]:
    return [("the mean", [float(np.mean(references))] * len(references))]


def _of_answers(references: Sequence[Any], _: Sequence[str]) -> list[tuple[str, list[Label]]]:
    firsts = [answers[0] if answers else "" for answers in references]
    return _constants(firsts, "no answer")


def _of_text(references: Sequence[Any], prompts: Sequence[str]) -> list[tuple[str, list[Label]]]:
    return [*_constants(references, "an empty answer"), ("a copy of the prompt", list(prompts))]


def _constants(references: Sequence[str], empty: str) -> list[tuple[str, list[Label]]]:
    size = len(references)
    return [(empty, [""] * size), ("the most frequent answer", [_most_frequent(references)] * size)]


def _most_frequent(values: Sequence[Any]) -> Any:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


_PREDICTIONS = {
    "label": _of_label,
    "labels": _of_labels,
    "number": _of_number,
    "answers": _of_answers,
    "text": _of_text,
}
