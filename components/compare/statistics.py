"""Intervals by the paired percentile bootstrap: documents or examples are resampled, candidates stay paired.

Every interval is drawn with the same seed, so that equal inputs give equal intervals and differences of samples of
one size see the same resamples. B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
Shapes: S resamples, N documents or examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CELLS_AT_ONCE = 1 << 22  # resampled values held in memory at a time


@dataclass(frozen=True)
class Value:
    """A measured value and the ends of its interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """As `report.json` has it."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Bootstrap:
    """Draws intervals.

    Attributes:
        seed: of the resamples.
        resamples: how many.
        coverage: of the interval, such as 0.95.
    """

    seed: int
    resamples: int
    coverage: float

    def bits_per_byte(self, nats: np.ndarray, num_bytes: np.ndarray) -> Value:
        """Σ nats / (ln 2 · Σ bytes), a ratio of sums over documents.

        Args:
            nats: (N,) loss of each document, summed over its tokens.
            num_bytes: (N,) UTF-8 bytes of each document.
        """
        return self._interval(_bits_per_byte, nats, num_bytes)

    def forgetting(self, nats: np.ndarray, nats_before: np.ndarray, num_bytes: np.ndarray) -> Value:
        """ΔBPB, paired by document: Σ (nats - nats before) / (ln 2 · Σ bytes).

        Args:
            nats: (N,) loss of each document under the candidate.
            nats_before: (N,) under the pretrained model.
            num_bytes: (N,) UTF-8 bytes of each document.
        """
        return self._interval(_bits_per_byte, np.asarray(nats) - np.asarray(nats_before), num_bytes)

    def mean(self, scores: np.ndarray) -> Value:
        """Mean of (N,) scores of examples."""
        return self._interval(_mean, scores)

    def mean_difference(self, scores: np.ndarray, baseline: np.ndarray) -> Value:
        """Mean of the differences of (N,) scores, paired by example."""
        return self._interval(_mean, np.asarray(scores) - np.asarray(baseline))

    def macro_f1(self, references: np.ndarray, predictions: np.ndarray) -> Value:
        """Macro-F1 of (N,) class indices; its interval from resampled examples."""
        return self._interval(_macro_f1_of(references, predictions), references, predictions)

    def macro_f1_difference(self, references: np.ndarray, predictions: np.ndarray, baseline: np.ndarray) -> Value:
        """Difference of two predictions' macro-F1, paired by example."""
        macro_f1 = _macro_f1_of(references, predictions, baseline)

        def difference(truth: np.ndarray, ours: np.ndarray, theirs: np.ndarray, axis: int = -1) -> np.ndarray:
            return macro_f1(truth, ours, axis) - macro_f1(truth, theirs, axis)

        return self._interval(difference, references, predictions, baseline)

    def _interval(self, statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> Value:
        """Percentile interval; a single observation, which cannot be resampled, is its own interval."""
        from scipy.stats import bootstrap

        data = tuple(np.asarray(sample) for sample in samples)
        size = len(data[0])
        if size == 0:
            raise ValueError("nothing was measured")
        value = float(statistic(*data, axis=-1))
        if size == 1:
            return Value(value, value, value)
        found = bootstrap(
            data,
            statistic,
            paired=True,
            vectorized=True,
            axis=-1,
            n_resamples=self.resamples,
            batch=max(1, CELLS_AT_ONCE // size),
            confidence_level=self.coverage,
            method="percentile",
            rng=np.random.default_rng(self.seed),
        ).confidence_interval
        return Value(value, float(found.low), float(found.high))


def _bits_per_byte(nats: np.ndarray, num_bytes: np.ndarray, axis: int = -1) -> np.ndarray:
    return nats.sum(axis) / (math.log(2) * num_bytes.sum(axis))


def _mean(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    return scores.mean(axis)


def _macro_f1_of(*whole: np.ndarray) -> Callable[..., np.ndarray]:
    """Macro-F1 over the classes that occur in the references or the predictions of a resample (scikit-learn's default).

    Args:
        whole: index arrays in which every class occurs that a resample can hold.
    """
    classes = np.unique(np.concatenate(whole))

    def macro_f1(references: np.ndarray, predictions: np.ndarray, axis: int = -1) -> np.ndarray:
        total, present = np.zeros(()), np.zeros(())
        for label in classes:
            true, given = references == label, predictions == label
            both, either = (true & given).sum(axis), true.sum(axis) + given.sum(axis)
            total = total + 2 * both / np.maximum(either, 1)
            present = present + (either > 0)
        return total / present

    return macro_f1
