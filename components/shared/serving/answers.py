"""Extractive answers: finds the best span over all windows of an example, unless no answer scores higher. Shapes: L tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LONGEST = 90
"""Maximum number of tokens after the first token of an answer: three times the value in transformers' example, since a
byte-level tokenizer can need three tokens for a Chinese character.
"""


@dataclass(frozen=True)
class ContextWindow:
    """One window over the context of an example.

    Attributes:
        logits: (L, 2) start and end logit of each token.
        context_from: index of the first context token.
        offsets: start and end of each context token, in characters of the context.
    """

    logits: np.ndarray
    context_from: int
    offsets: Sequence[Sequence[int]]


@dataclass(frozen=True)
class PredictedAnswer:
    """The answer of a model.

    Attributes:
        text: empty if the model predicts that there is no answer; None if a score is not finite.
        span_score: start plus end logit of the best span; None if there is no span, or if it is not finite.
        null_score: the same for the first token, which represents no answer; None if it is not finite.
    """

    text: str | None
    span_score: float | None
    null_score: float | None


def answer(windows: Sequence[ContextWindow], context: str) -> PredictedAnswer:
    """Determines the answer from a model's logits for all windows of one example.

    Follows the question-answering example of transformers (run_qa.py): returns the best span of all windows, unless the lowest
    score of the first token in any window is higher. Searches every span up to `LONGEST`, not only the most likely ends.

    Args:
        windows: in the order of the context. Of equal spans, the shortest in the first window is chosen.
        context: text that the offsets refer to.
    """
    null_score = min(float(window.logits[0].sum()) for window in windows)
    if not all(np.isfinite(window.logits).all() for window in windows):
        return PredictedAnswer(None, None, None)
    best, start, end = -math.inf, 0, 0
    for window in windows:
        score, first, last = _best_span(window)
        if score > best:
            best, start, end = score, window.offsets[first][0], window.offsets[last][1]
    if best == -math.inf:
        return PredictedAnswer("", None, null_score)
    return PredictedAnswer("" if null_score > best else context[start:end].strip(), best, null_score)


def _best_span(window: ContextWindow) -> tuple[float, int, int]:
    """Returns the highest score with first and last token, relative to the context's start; -inf if the context is empty."""
    size = len(window.offsets)
    starts, ends = window.logits[window.context_from : window.context_from + size].astype(np.float64).T
    best, first, last = -math.inf, 0, 0
    for length in range(min(LONGEST + 1, size)):
        scores = starts[: size - length] + ends[length:]
        at = int(np.argmax(scores))
        # Shorter spans are checked first, so that the shortest of equal spans is chosen.
        if scores[at] > best:
            best, first, last = float(scores[at]), at, at + length
    return best, first, last
