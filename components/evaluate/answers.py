"""Extractive answers: the best span over all windows of an example, against there being none. Shapes: L tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LONGEST = 90
"""Tokens that an answer may go on after its first: three times as many as in transformers' example, since a byte-level
tokenizer can take three for a character of Chinese."""


@dataclass(frozen=True)
class Window:
    """One window over the context of an example.

    Attributes:
        logits: (L, 2) start and end logit of each token.
        context_from: its first token of the context.
        offsets: from and to, in characters of the context, of each of its context tokens.
    """

    logits: np.ndarray
    context_from: int
    offsets: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Answer:
    """What a model answers.

    Attributes:
        text: empty where it says that the context holds no answer; None if a score is not finite.
        span_score: start plus end logit of the best span; None if there is none, or it is not finite.
        null_score: the same of the first token, which stands for no answer; None if it is not finite.
    """

    text: str | None
    span_score: float | None
    null_score: float | None


def answer(windows: Sequence[Window], context: str) -> Answer:
    """Puts together what a model says of all windows of one example.

    As in the question-answering example of transformers (run_qa.py): the best span of all windows, unless the lowest score
    of the first token in any window is higher. Every span up to `LONGEST` is looked at, not only the likeliest ends.

    Args:
        windows: in the order of the context; of equal spans the shortest in the first window is taken.
        context: what the offsets count the characters of.
    """
    null_score = min(float(window.logits[0].sum()) for window in windows)
    if not all(np.isfinite(window.logits).all() for window in windows):
        return Answer(None, None, None)
    best, start, end = -math.inf, 0, 0
    for window in windows:
        score, first, last = _best_span(window)
        if score > best:
            best, start, end = score, window.offsets[first][0], window.offsets[last][1]
    if best == -math.inf:
        return Answer("", None, null_score)
    return Answer("" if null_score > best else context[start:end].strip(), best, null_score)


def _best_span(window: Window) -> tuple[float, int, int]:
    """Highest score with first and last token, counted from the first of the context; -inf where that is empty."""
    size = len(window.offsets)
    starts, ends = window.logits[window.context_from : window.context_from + size].astype(np.float64).T
    best, first, last = -math.inf, 0, 0
    for length in range(min(LONGEST + 1, size)):
        scores = starts[: size - length] + ends[length:]
        at = int(np.argmax(scores))
        # Shorter spans come first, so that of equal ones the shortest is taken.
        if scores[at] > best:
            best, first, last = float(scores[at]), at, at + length
    return best, first, last
