"""Scores of predictions: of one example, and of a split."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from .config import METRICS

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


def example_score(metric: str, prediction: str, reference: str) -> float:
    """Score of one example. For macro-F1, which only a whole split has, 1 where the prediction is right."""
    return token_f1(prediction, reference) if metric == "token_f1" else exact_match(prediction, reference)


def split_scores(kind: str, references: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """All metrics of a task kind over a split."""
    if kind == "classification":
        from sklearn.metrics import accuracy_score, f1_score

        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0)),
        }
    pairs = list(zip(predictions, references, strict=True))
    return {metric: sum(example_score(metric, *pair) for pair in pairs) / len(pairs) for metric in METRICS[kind]}


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
