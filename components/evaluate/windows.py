"""Windows over long documents, so that every token is scored once: with context before it, or masked.

A causal model cannot predict the first token, which has no context; a masked one predicts every token from both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

MASK_SEED = 0
"""Of the fixed masks: part of the measure, not of a run, so that all runs and candidates are measured alike."""


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `end` of a document, of which those from `scored_from` on are scored.

    Attributes:
        scored_from: position in the document; above `start`, unless the document's first token is scored, too.
    """

    start: int
    end: int
    scored_from: int


def windows(length: int, max_length: int, scored_from: int = 1) -> Iterator[Window]:
    """Cuts a document into overlapping windows with a stride of half a window.

    Every window after the first scores what those before it did not reach, so its scored tokens have at least half a
    window before them.

    Args:
        length: of the document, in tokens.
        max_length: of a window; at least 2.
        scored_from: first scored token of the document: 1 where the first has no context, 0 where it needs none.
    """
    stride = max_length // 2
    start = 0
    while scored_from < length:
        end = min(start + max_length, length)
        yield Window(start, end, scored_from)
        start, scored_from = start + stride, end


def mask_passes(mask_probability: float) -> int:
    """In how many passes a text is read, so that about `mask_probability` of its tokens are masked in each."""
    return max(2, round(1 / mask_probability))


def masks(ordinary: np.ndarray, passes: int, document: int, start: int) -> Iterator[np.ndarray]:
    """What is masked in each pass over a window: every ordinary token in one pass, and no two passes share one.

    A pure function of its arguments, so that all candidates are asked for the same tokens in the same surroundings.

    Args:
        ordinary: (n,) positions of the tokens to score.
        passes: k; fewer come back where there are fewer tokens.
        document: index of the document in its split.
        start: of the window in the document.

    Yields:
        Positions, sorted; at least one.
    """
    turn = np.random.default_rng([MASK_SEED, document, start]).permutation(len(ordinary)) % passes
    for number in range(min(passes, len(ordinary))):
        yield ordinary[turn == number]
