"""Scores of predictions, for single examples and for splits."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from .config import METRICS

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


def example_score(kind: str, metric: str, prediction: Label, reference: Label) -> float:
    """Returns the score of one example; higher is better.

    If the task's metric is a mean over examples, it is the mean of these scores. F1 over labels and correlations are defined
    for a whole split only: the score is then 1 if all labels are right, and in regression the negative absolute error.
    """
    if kind == "regression":
        assert isinstance(prediction, float)
        assert isinstance(reference, float)
        return -abs(prediction - reference)
    if kind == "multi_label":
        assert isinstance(prediction, list)
        assert isinstance(reference, list)
        return float(set(prediction) == set(reference))
    assert isinstance(prediction, str)
    # If the reference has no answer, the empty answer is right.
    accepted = (reference or [""]) if isinstance(reference, list) else [str(reference)]
    score = token_f1 if metric == "token_f1" else exact_match
    return max(score(prediction, text) for text in accepted)


def split_scores(
    kind: str, references: Sequence[Label], predictions: Sequence[Label | None], labels: Sequence[str] = ()
) -> dict[str, float | None]:
    """Computes all metrics of a task over a split; None if predictions are missing because a logit is not finite.

    n-gram metrics of generation are in `Overlap`.

    Args:
        labels: multi-label: all label names.
    """
    known = [prediction for prediction in predictions if prediction is not None]
    names = [*METRICS[kind], *{"multi_label": ["exact_match"], "regression": ["mae", "rmse"]}.get(kind, [])]
    if kind == "generation":
        names = ["exact_match", "token_f1"]
    if len(known) < len(references):
        return dict.fromkeys(names)
    if kind == "classification":
        from sklearn.metrics import accuracy_score, f1_score

        return {
            "accuracy": float(accuracy_score(references, known)),
            "macro_f1": float(f1_score(references, known, average="macro", zero_division=0)),
        }
    if kind == "regression":
        return _regression(np.asarray(references, np.float64), np.asarray(known, np.float64))
    pairs = list(zip(known, references, strict=True))
    found: dict[str, float | None] = {}
    if kind == "multi_label":
        found = _label_f1(_indicators(references, labels), _indicators(known, labels))
    for metric in names:
        if metric not in found:
            found[metric] = sum(example_score(kind, metric, *pair) for pair in pairs) / len(pairs)
    return found


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


def _label_f1(truth: np.ndarray, given: np.ndarray) -> dict[str, float | None]:
    """Returns micro- and macro-F1 of (N, C) indicators. Macro-F1 covers the labels that occur and is 0 if none do."""
    from sklearn.metrics import f1_score

    # scikit-learn would treat a single column as binary labels and count negatives too, so a column is added.
    truth, given = (np.pad(one, ((0, 0), (0, 1))) for one in (truth, given))
    if not (truth.any() or given.any()):
        return {"micro_f1": 0.0, "macro_f1": 0.0}
    return {
        "micro_f1": float(f1_score(truth, given, average="micro")),
        "macro_f1": float(f1_score(truth, given, average="macro", zero_division=np.nan)),
    }


def _regression(truth: np.ndarray, given: np.ndarray) -> dict[str, float | None]:
    """Returns correlations, and errors in the label's unit. Correlations of constant values are defined as 0."""
    from scipy.stats import DegenerateDataWarning, pearsonr, spearmanr

    def correlation(of: Callable[..., Any]) -> float:
        if len(truth) < 2:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("error", DegenerateDataWarning)
            try:
                return float(of(truth, given).statistic)
            except DegenerateDataWarning:
                return 0.0

    return {
        "pearson": correlation(pearsonr),
        "spearman": correlation(spearmanr),
        "mae": float(np.abs(given - truth).mean()),
        "rmse": float(np.sqrt(np.square(given - truth).mean())),
    }


def _indicators(rows: Sequence[Label], labels: Sequence[str]) -> np.ndarray:
    """Returns (N, C) indicators: 1 if the row has the label."""
    place = {label: number for number, label in enumerate(labels)}
    found = np.zeros((len(rows), len(labels)), np.int64)
    for number, row in enumerate(rows):
        assert isinstance(row, list)
        found[number, [place[label] for label in row]] = 1
    return found


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
