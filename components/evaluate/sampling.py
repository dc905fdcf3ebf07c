"""Draws the part of a held-out split that is read, so that its values stay unbiased estimates for the whole split.

Of labelled examples, all are equally likely to be drawn, so that means over them need no weights.

Of text, the unit of the sample is a scoring window; for a masked model, one of the passes over a window. Units are drawn
systematically with probabilities in proportion to their bytes (W. Madow 1949, On the theory of systematic sampling, II): along
all units in a random order of the documents, one is taken at every τ-th byte. So a long document is read in windows spread over
it, and a masked model reads more windows with one pass each instead of fewer windows with all passes.

The sum of a quantity x over the split is estimated by Σ x_u / π_u over the drawn units, where π_u is the probability of drawing
unit u (D. Horvitz and D. Thompson 1952, A generalization of sampling without replacement from a finite universe), which is
unbiased. With π_u in proportion to the bytes, the estimated sum of the bytes is the true one, whatever is drawn. The ratio of
the two, bits per byte, is therefore unbiased too, and varies only as the bits per byte of the units do. Shapes: N documents, U
units, D drawn units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .windows import count_windows, window_at

SAMPLE_SEED = 0
"""Seed of the sample. It is not configurable, so that all candidates and all runs on the same data read the same text."""
NEARLY_ALL = 1.1
"""If reading everything costs at most this many times the budget, everything is read: a sample would save next to nothing."""
_HALVINGS = 60


@dataclass(frozen=True)
class TextSample:
    """The units of a split that are read.

    Attributes:
        document: (D,) index of the document of each unit.
        window: (D,) number of its window in the document.
        turn: (D,) masked LM: its pass over the window; else 0.
        probability: (D,) probability with which it was drawn; 1 where everything is read.
        num_bytes: (D,) its share in the bytes of the document, in proportion to the scored tokens.
        documents_in_split: N.
    """

    document: np.ndarray
    window: np.ndarray
    turn: np.ndarray
    probability: np.ndarray
    num_bytes: np.ndarray
    documents_in_split: int

    def __len__(self) -> int:
        return len(self.document)

    @property
    def is_part(self) -> bool:
        """Tells whether some of the text is not read."""
        return bool((self.probability < 1).any())


def draw_text(
    lengths: np.ndarray,
    num_bytes: np.ndarray,
    max_length: int,
    max_tokens: int | None,
    passes: int | None = None,
    seed: int = 0,
) -> TextSample:
    """Draws the units of one split that are read.

    Args:
        lengths: (N,) tokens of each document.
        num_bytes: (N,) UTF-8 bytes of each document.
        max_length: tokens in a window.
        max_tokens: number of tokens that the model reads, apart from chance in the lengths of the drawn units; None reads all.
            See also `NEARLY_ALL`.
        passes: masked LM: number of passes over a window; None for a causal LM.
        seed: distinguishes samples of different splits.
    """
    scored_from, turns = (1, 1) if passes is None else (0, passes)
    rng = np.random.default_rng([SAMPLE_SEED, seed])
    order = rng.permutation(len(lengths))
    start = rng.random()
    # At least one unit for each document: one that holds nothing to predict has bytes all the same.
    counts = np.maximum(count_windows(lengths, max_length, scored_from), 1)[order]
    document = np.repeat(order, counts * turns)
    inside = np.arange(len(document)) - np.repeat(np.cumsum(counts * turns) - counts * turns, counts * turns)
    window, turn = np.divmod(inside, turns)
    first, end, scored = window_at(lengths[document], window, max_length, scored_from)
    predictable = np.maximum(lengths - scored_from, 1)[document]
    shares = num_bytes[document] * np.where(lengths[document] > scored_from, (end - scored) / predictable, 1) / turns
    costs = end - first
    reads_all = max_tokens is None or costs.sum() <= NEARLY_ALL * max_tokens
    probability = inclusion(shares, costs, None if reads_all else max_tokens)
    drawn = systematic(probability, start)
    drawn = drawn[np.lexsort((turn[drawn], window[drawn], document[drawn]))]
    return TextSample(document[drawn], window[drawn], turn[drawn], probability[drawn], shares[drawn], len(lengths))


def draw_examples(ids: Sequence[str], labels: np.ndarray, max_examples: int, seed: int = 0) -> np.ndarray:
    """Draws the labelled examples of one split that are read.

    Each is drawn with the same probability: systematically, in a random order within each label. So the labels keep their
    shares, to one example.

    Args:
        ids: (M,) id of the example of each document; several windows over a long context are one example.
        labels: (M,) index of the label of each document; the same for all if the task has no classes.
        max_examples: number of examples. See also `NEARLY_ALL`.
        seed: distinguishes samples of different splits.

    Returns:
        (M,) bool, whether each document is read.
    """
    _, first, example = np.unique(np.array(ids), return_index=True, return_inverse=True)
    count = len(first)
    if count <= NEARLY_ALL * max_examples:
        return np.ones(len(ids), bool)
    rng = np.random.default_rng([SAMPLE_SEED, seed])
    order = np.lexsort((rng.random(count), labels[first]))
    drawn = np.zeros(count, bool)
    drawn[order[systematic(np.full(count, max_examples / count), rng.random())]] = True
    return drawn[example]


def inclusion(sizes: np.ndarray, costs: np.ndarray, budget: float | None) -> np.ndarray:
    """Returns the (U,) probabilities of drawing each unit, min(1, size / τ), with τ such that the expected cost is the budget.

    Their sum is an integer, the number of units that are drawn.

    Args:
        sizes: (U,) sizes.
        costs: (U,) costs of reading each unit.
        budget: expected cost; None draws all units.
    """
    if budget is None or costs.sum() <= budget:
        return np.ones(len(sizes))
    sizes = np.maximum(sizes, 1e-9 * sizes.max() + 1e-9)  # a unit of zero bytes must be drawn at times, too
    low, high = 0.0, float(sizes @ costs / budget)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if np.minimum(1, sizes / middle) @ costs > budget:
            low = middle
        else:
            high = middle
    certain = sizes >= high
    rest = np.where(certain, 0, sizes)
    number = max(1, int(rest.sum() / high + 1e-9))
    return np.where(certain, 1.0, np.minimum(1.0, number * rest / rest.sum()))


def systematic(probability: np.ndarray, start: float) -> np.ndarray:
    """Draws units at start, start + 1, start + 2, ... along their cumulated probabilities.

    Args:
        probability: (U,) with an integer sum.
        start: in [0, 1).

    Returns:
        (D,) indices of the drawn units, each once.
    """
    ends = np.round(np.cumsum(probability), 10)  # certain units end at whole numbers, without rounding errors
    places = np.searchsorted(ends, start + np.arange(round(float(ends[-1])) if len(ends) else 0), side="right")
    return np.unique(np.minimum(places, len(ends) - 1))
