"""Splits long documents into windows, so that every token is scored once: with context before it, or masked.

A causal model cannot predict the first token, which has no context. A masked model predicts every token from both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

MASK_SEED = 0
"""Seed of the fixed masks. It is part of the metric and not configurable, so that results of all runs are comparable."""


@dataclass(frozen=True)
class ScoringWindow:
    """Tokens `start` to `end` of a document. Those from `scored_from` on are scored.

    Attributes:
        scored_from: position in the document; above `start`, unless the document's first token is scored too.
    """

    start: int
    end: int
    scored_from: int


def windows(length: int, max_length: int, scored_from: int = 1) -> Iterator[ScoringWindow]:
    """Splits a document into overlapping windows with a stride of half a window.

    Every window after the first scores the tokens that earlier windows did not cover, so its scored tokens have at least half a
    window of context.

    Args:
        length: tokens in the document.
        max_length: tokens per window; at least 2.
        scored_from: first scored token of the document: 1 if the first token has no context, 0 if it needs none.
    """
    stride = max_length // 2
    start = 0
    while scored_from < length:
        end = min(start + max_length, length)
        yield ScoringWindow(start, end, scored_from)
        start, scored_from = start + stride, end


def mask_passes(mask_probability: float) -> int:
    """Returns the number of passes over a text, so that each masks about `mask_probability` of its tokens."""
    return max(2, round(1 / mask_probability))


def masks(ordinary: np.ndarray, passes: int, document: int, start: int) -> Iterator[np.ndarray]:
    """Yields the masked positions of each pass over a window. Every ordinary token is masked in exactly one pass.

    A pure function of its arguments, so that all candidates predict the same tokens in the same context.

    Args:
        ordinary: (n,) positions of the tokens to score.
        passes: k; fewer are yielded if there are fewer tokens.
        document: index of the document in its split.
        start: start of the window in the document.

    Yields:
        Sorted positions; at least one.
    """
    turn = np.random.default_rng([MASK_SEED, document, start]).permutation(len(ordinary)) % passes
    for number in range(min(passes, len(ordinary))):
        yield ordinary[turn == number]
