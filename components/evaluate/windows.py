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


def count_windows(lengths: np.ndarray, max_length: int, scored_from: int = 1) -> np.ndarray:
    """Returns the number of windows over documents of these lengths, an array of the same shape.

    Args:
        lengths: tokens in each document.
        max_length: tokens per window; at least 2.
        scored_from: first scored token of a document: 1 if the first token has no context, 0 if it needs none.
    """
    stride = max_length // 2
    further = np.maximum(0, -(-(np.asarray(lengths) - max_length) // stride))
    return np.where(np.asarray(lengths) > scored_from, 1 + further, 0)


def window_at(
    lengths: np.ndarray, numbers: np.ndarray, max_length: int, scored_from: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns start, end and first scored token of windows. Each window starts half a window after the one before.

    Every window after the first scores the tokens that earlier windows did not cover, so its scored tokens have at least half a
    window of context.

    Args:
        lengths: tokens in the document of each window.
        numbers: number of each window in its document, from 0.
        max_length: tokens per window; at least 2.
        scored_from: first scored token of a document.
    """
    start = numbers * (max_length // 2)
    end = np.minimum(start + max_length, lengths)
    before = np.minimum(start - max_length // 2 + max_length, lengths)
    return start, end, np.where(numbers == 0, scored_from, before)


def windows(length: int, max_length: int, scored_from: int = 1) -> Iterator[ScoringWindow]:
    """Yields all windows over a document, in order; see `window_at`."""
    numbers = np.arange(int(count_windows(np.array(length), max_length, scored_from)))
    for parts in zip(*window_at(np.array(length), numbers, max_length, scored_from), strict=True):
        yield ScoringWindow(*map(int, parts))


def mask_passes(mask_probability: float) -> int:
    """Returns the number of passes over a text, so that each masks about `mask_probability` of its tokens."""
    return max(2, round(1 / mask_probability))


def mask(ordinary: np.ndarray, passes: int, document: int, start: int, turn: int) -> np.ndarray:
    """Returns the positions that one pass over a window masks. Every ordinary token is masked in exactly one pass.

    A pure function of its arguments, so that all candidates predict the same tokens in the same context.

    Args:
        ordinary: (n,) positions of the tokens to score.
        passes: k.
        document: index of the document in its split.
        start: start of the window in the document.
        turn: number of the pass, from 0 to k - 1.

    Returns:
        Sorted positions; none in the last passes if there are fewer than k tokens.
    """
    turns = np.random.default_rng([MASK_SEED, document, start]).permutation(len(ordinary)) % passes
    return ordinary[turns == turn]
