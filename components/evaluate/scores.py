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

# A word, or one character of a script that is written without spaces.
_UNSPACED = "぀-ヿ㐀-䶿一-鿿豈-﫿฀-๿"
_WORDS = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def exact_match(prediction: str, reference: str) -> float:
    """1 where both are the same text, blanks aside."""
    return float(_plain(prediction) == _plain(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of the precision and recall of words, case aside (P. Rajpurkar et al., SQuAD, arXiv:1606.05250).

    In scripts without spaces every character is a word. Texts without any word are compared as they are.
    """
    ours, theirs = (_WORDS.findall(_plain(text).casefold()) for text in (prediction, reference))
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
    """All metrics of a task kind over a split; None where a prediction is not known, since a logit is not finite.

    Args:
        labels: multi-label: names of all labels.
    """
    known = [prediction for prediction in predictions if prediction is not None]
    names = [*METRICS[kind], *{"multi_label": ["exact_match"], "regression": ["mae", "rmse"]}.get(kind, [])]
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
