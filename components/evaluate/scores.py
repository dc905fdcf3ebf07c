"""Scores of predictions: of one example, and of a split."""

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
"""What is asked for or given: a label or a text; a number (regression); labels, or the texts that answer a question."""

CALIBRATION_BINS = 15

# A word, or one character of a script that is written without spaces.
_UNSPACED = "぀-ヿ㐀-䶿一-鿿豈-﫿฀-๿"
_WORDS = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def word_list(text: str) -> list[str]:
    """The words of a text, case aside; in scripts without spaces every character is one."""
    return _WORDS.findall(_plain(text).casefold())


def exact_match(prediction: str, reference: str) -> float:
    """1 where both are the same text, blanks aside."""
    return float(_plain(prediction) == _plain(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of the precision and recall of words, case aside (P. Rajpurkar et al., SQuAD, arXiv:1606.05250).

    In scripts without spaces every character is a word. Texts without any word are compared as they are.
    """
    ours, theirs = word_list(prediction), word_list(reference)
    if not ours and not theirs:
        return exact_match(prediction, reference)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def example_score(kind: str, metric: str, prediction: Label, reference: Label) -> float:
    """Score of one example; more is better.

    Where the task's metric is a mean over examples, it is the mean of these. F1 over labels and correlations only a whole
    split has: there it is 1 where all labels are right, and in regression the negative of the absolute error.
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
    # No answer in the context is right where none is given.
    accepted = (reference or [""]) if isinstance(reference, list) else [str(reference)]
    score = token_f1 if metric == "token_f1" else exact_match
    return max(score(prediction, text) for text in accepted)


def split_scores(
    kind: str, references: Sequence[Label], predictions: Sequence[Label | None], labels: Sequence[str] = ()
) -> dict[str, float | None]:
    """All metrics of a task kind over a split; None if a prediction is not known, since a logit is not finite.

    Those of generation that count n-grams are apart, in `Overlap`.

    Args:
        labels: multi-label: names of all labels.
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
    """How often each label (row) was given each label (column), both in the order of `labels`."""
    place = {label: number for number, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(counts, ([place[one] for one in references], [place[one] for one in predictions]), 1)
    return counts.tolist()


def calibration_error(confidence: Sequence[float], right: Sequence[bool]) -> float:
    """Expected calibration error: Σ_b n_b / N · |accuracy of b - mean confidence of b| over `CALIBRATION_BINS` even bins.

    C. Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3 (arXiv:1706.04599); a bin has its upper end.

    Args:
        confidence: (N,) probability of the predicted label.
        right: (N,) whether that is the true one.
    """
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]
    place = np.digitize(confidence, edges, right=True)
    # n_b · (accuracy - confidence) is a plain sum, so that empty bins need no care.
    gaps = np.bincount(place, np.asarray(right, np.float64) - np.asarray(confidence, np.float64), CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(place))


def _label_f1(truth: np.ndarray, given: np.ndarray) -> dict[str, float | None]:
    """Micro- and macro-F1 of (N, C) indicators; the latter over the labels that occur, 0 where none does at all."""
    from sklearn.metrics import f1_score

    # A single column would be read as a yes-or-no answer, whose noes count as well.
    truth, given = (np.pad(one, ((0, 0), (0, 1))) for one in (truth, given))
    if not (truth.any() or given.any()):
        return {"micro_f1": 0.0, "macro_f1": 0.0}
    return {
        "micro_f1": float(f1_score(truth, given, average="micro")),
        "macro_f1": float(f1_score(truth, given, average="macro", zero_division=np.nan)),
    }


def _regression(truth: np.ndarray, given: np.ndarray) -> dict[str, float | None]:
    """Correlations, and errors in the label's unit. What is constant correlates with nothing: 0 by definition here."""
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
    """(N, C) 1 where the row has the label."""
    place = {label: number for number, label in enumerate(labels)}
    found = np.zeros((len(rows), len(labels)), np.int64)
    for number, row in enumerate(rows):
        assert isinstance(row, list)
        found[number, [place[label] for label in row]] = 1
    return found


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
