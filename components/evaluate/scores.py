"""Scores of predictions, for single examples and for splits."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..shared.metrics import over_split, split_statistic
from ..shared.task_kinds import TASK_KINDS, Target, Task

Label: TypeAlias = str | float | list[str]
"""A reference or a prediction: a label or text; a number (regression); labels, or the accepted answers to a question."""

CALIBRATION_BINS = 15

# Matches a word, or one character of a script that is written without spaces.
_UNSPACED = "぀-ヿ㐀-䶿一-鿿豈-﫿฀-๿"
_WORDS = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def word_list(text: str) -> list[str]:
    """Returns the words of a text, case-folded. In scripts without spaces every character is a word."""
    return _WORDS.findall(_plain(text).casefold())


def exact_match(prediction: str, reference: str) -> float:
    """Returns 1 if both texts are equal except for white space, else 0."""
    return float(_plain(prediction) == _plain(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Returns the harmonic mean of precision and recall of words, ignoring case (P. Rajpurkar et al., SQuAD, arXiv:1606.05250).

    In scripts without spaces every character is a word. Texts without words are compared as they are.
    """
    ours, theirs = word_list(prediction), word_list(reference)
    if not ours and not theirs:
        return exact_match(prediction, reference)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def example_score(kind: Task, metric: str, prediction: Label, reference: Label) -> float:
    """Returns the score of one example; higher is better.

    If the task's metric is a mean over examples, it is the mean of these scores. F1 over labels and correlations are defined
    for a whole split only: the score is then 1 if all labels are right, and in regression the negative absolute error.
    """
    return _SCORES[TASK_KINDS[kind].target](metric, prediction, reference)


def _score_of_number(_: str, prediction: Any, reference: Any) -> float:
    return -abs(prediction - reference)


def _score_of_labels(_: str, prediction: Any, reference: Any) -> float:
    return float(set(prediction) == set(reference))


def _score_of_text(metric: str, prediction: Any, reference: Any) -> float:
    return _score_of_answer(metric, prediction, [reference])


def _score_of_answer(metric: str, prediction: Any, reference: Any) -> float:
    """Returns the score for the best of the accepted answers. If there is none, the empty answer is right."""
    score = token_f1 if metric == "token_f1" else exact_match
    return max(score(prediction, text) for text in reference or [""])


_SCORES: dict[Target, Callable[[str, Any, Any], float]] = {
    "label": _score_of_text,
    "labels": _score_of_labels,
    "number": _score_of_number,
    "answers": _score_of_answer,
    "text": _score_of_text,
}


def split_scores(kind: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Computes all metrics of a task over a split; None if predictions are missing because a logit is not finite.

    Args:
        rows: at least one example with `reference` and `prediction`; in generation also with the scores of `Overlap`.
    """
    names = [*TASK_KINDS[kind].metrics, *TASK_KINDS[kind].further_metrics]
    if any(row["prediction"] is None for row in rows):
        return dict.fromkeys(names)
    return {metric: _split_score(kind, metric, rows) for metric in names}


def _split_score(kind: Task, metric: str, rows: Sequence[Mapping[str, Any]]) -> float:
    statistic = split_statistic(metric, rows)
    if statistic is not None:
        return over_split(statistic, len(rows))
    if metric in ("mae", "rmse"):
        errors = np.array([row["prediction"] - row["reference"] for row in rows], np.float64)
        return float(np.abs(errors).mean() if metric == "mae" else np.sqrt(np.square(errors).mean()))
    known = (row.get(metric) for row in rows)
    scores = [
        example_score(kind, metric, row["prediction"], row["reference"]) if score is None else score
        for row, score in zip(rows, known, strict=True)
    ]
    return sum(scores) / len(scores)


def confusion_matrix(references: Sequence[str], predictions: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Counts how often each label (row) was predicted as each label (column), both in the order of `labels`."""
    place = {label: number for number, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(counts, ([place[one] for one in references], [place[one] for one in predictions]), 1)
    return counts.tolist()


def calibration_error(confidence: Sequence[float], right: Sequence[bool]) -> float:
    """Returns the expected calibration error over `CALIBRATION_BINS` even bins.

    Σ_b n_b / N · |accuracy of b - mean confidence of b| (C. Guo et al. 2017, On Calibration of Modern Neural Networks,
    equation 3, arXiv:1706.04599). A bin includes its upper end.

    Args:
        confidence: (N,) probability of the predicted label.
        right: (N,) whether the predicted label is correct.
    """
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]
    place = np.digitize(confidence, edges, right=True)
    # n_b · (accuracy - confidence) is a plain sum, so that empty bins are no special case.
    gaps = np.bincount(place, np.asarray(right, np.float64) - np.asarray(confidence, np.float64), CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(place))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
