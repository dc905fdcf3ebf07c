"""Intervals from the paired percentile bootstrap, which resamples documents or examples and keeps candidates paired.

All intervals use the same seed, so that equal inputs give equal intervals and differences of samples of one size use the same
resamples. B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Means are resampled directly;
metrics of a whole split (F1, correlations, BLEU) from sums over the resampled examples, with `shared/metrics.py`. Shape: N
documents or examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..shared.metrics import Statistic

CELLS_AT_ONCE = 1 << 22  # resampled values held in memory at a time


@dataclass(frozen=True)
class Value:
    """A measured value with its interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Returns the value in the format of `report.json`."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Bootstrap:
    """Computes bootstrap intervals.

    Attributes:
        seed: seed of the resamples.
        resamples: number of resamples.
        coverage: coverage of the intervals, such as 0.95.
    """

    seed: int
    resamples: int
    coverage: float

    def bits_per_byte(self, nats: np.ndarray, num_bytes: np.ndarray) -> Value:
        """Computes Σ nats / (ln 2 · Σ bytes), a ratio of sums over documents.

        Args:
            nats: (N,) loss of each document, summed over its tokens.
            num_bytes: (N,) UTF-8 bytes of each document.
        """
        return self._interval(_bits_per_byte, nats, num_bytes)

    def forgetting(self, nats: np.ndarray, nats_before: np.ndarray, num_bytes: np.ndarray) -> Value:
        """Computes ΔBPB, paired by document: Σ (nats - nats before) / (ln 2 · Σ bytes).

        Args:
            nats: (N,) loss of each document under the candidate.
            nats_before: (N,) loss of each document under the pretrained model.
            num_bytes: (N,) UTF-8 bytes of each document.
        """
        return self._interval(_bits_per_byte, np.asarray(nats) - np.asarray(nats_before), num_bytes)

    def mean(self, scores: np.ndarray) -> Value:
        """Computes the mean of (N,) scores of examples."""
        return self._interval(_mean, scores)

    def mean_difference(self, scores: np.ndarray, baseline: np.ndarray) -> Value:
        """Computes the mean of the differences of (N,) scores, paired by example."""
        return self._interval(_mean, np.asarray(scores) - np.asarray(baseline))

    def of_split(self, metric: Statistic, size: int) -> Value:
        """Computes a metric that is defined for a whole split.

        Args:
            metric: a statistic of `shared/metrics.py`.
            size: N.
        """
        return self._interval(_of_indices(metric, size), np.arange(size))

    def difference(self, metric: Statistic, baseline: Statistic, size: int) -> Value:
        """Computes the difference of two candidates' metrics, paired by example: both use the same resamples."""

        def between(counts: np.ndarray) -> np.ndarray:
            return metric(counts) - baseline(counts)

        return self.of_split(between, size)

    def _interval(self, statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> Value:
        """Computes the percentile interval. A single observation cannot be resampled; its interval is the value itself."""
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


def _of_indices(metric: Statistic, size: int) -> Callable[..., np.ndarray]:
    """Converts a metric to a function of resampled indices, as scipy draws them."""

    def of_indices(indices: np.ndarray, axis: int = -1) -> np.ndarray:
        rows = np.moveaxis(np.atleast_2d(indices), axis, -1)
        places = rows + size * np.arange(len(rows))[:, None]
        counts = np.bincount(places.ravel(), minlength=size * len(rows)).reshape(len(rows), size)
        found = metric(counts.astype(np.float64))
        return found if indices.ndim > 1 else found[0]

    return of_indices
