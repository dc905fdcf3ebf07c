"""Intervals from the paired percentile bootstrap, which resamples documents or examples and keeps candidates paired.

All intervals use the same seed, so that equal inputs give equal intervals and differences of samples of one size use the same
resamples. B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Means are resampled directly;
metrics of a whole split (F1, correlations, BLEU) from sums over the resampled examples, with `Statistic`. Shapes: S resamples,
N documents or examples, C classes or labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..shared.third_party.sacrebleu import score_from

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

CELLS_AT_ONCE = 1 << 22  # resampled values held in memory at a time
NEARLY_CONSTANT = float(np.finfo(np.float64).eps ** 0.75)
"""Relative spread below which values count as constant, as in scipy: smaller spreads are rounding errors."""

Statistic: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Maps (S, N) counts of each example in each resample to the (S,) metric of each resample."""


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
            metric: a statistic of one of the functions below.
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


def micro_f1(truth: np.ndarray, given: np.ndarray) -> Statistic:
    """Creates the micro-F1 of (N, C) indicators: 2 Σ true positives / Σ (labels in the reference + predicted labels).

    0 if there are no labels at all, as in scikit-learn.
    """
    both, either = (truth & given).sum(1).astype(np.float64), (truth.astype(np.float64) + given).sum(1)

    def metric(counts: np.ndarray) -> np.ndarray:
        return 2 * (counts @ both) / np.maximum(counts @ either, 1)

    return metric


def macro_f1(truth: np.ndarray, given: np.ndarray) -> Statistic:
    """Creates the macro-F1 of (N, C) indicators, over the classes in the references or the predictions of a resample.

    For classes this is scikit-learn's default; for labels, `zero_division=nan`. 0 if there are no labels at all.
    """
    both, either = (truth & given).astype(np.float64), truth.astype(np.float64) + given

    def metric(counts: np.ndarray) -> np.ndarray:
        total = counts @ either
        scores = 2 * (counts @ both) / np.maximum(total, 1)
        return scores.sum(1) / np.maximum((total > 0).sum(1), 1)

    return metric


def bleu(counts_of_each: Sequence[Sequence[int]]) -> Statistic:
    """Creates BLEU in 0..1 with sacrebleu, from (N, 10) counts per example that are summed over a resample.

    As sacrebleu's own paired bootstrap (P. Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation).
    """
    from sacrebleu.metrics.bleu import BLEU

    return _of_sums(BLEU(), counts_of_each)


def chrf(counts_of_each: Sequence[Sequence[int]]) -> Statistic:
    """Creates chrF in 0..1 with sacrebleu, from (N, 18) counts per example that are summed over a resample."""
    from sacrebleu.metrics.chrf import CHRF

    return _of_sums(CHRF(), counts_of_each)


def _of_sums(score: Metric, counts_of_each: Sequence[Sequence[int]]) -> Statistic:
    own = np.asarray(counts_of_each, np.float64)

    def metric(counts: np.ndarray) -> np.ndarray:
        sums = np.rint(counts @ own).astype(np.int64).tolist()
        return np.array([score_from(score, row) / 100 for row in sums])

    return metric


def pearson(truth: np.ndarray, given: np.ndarray) -> Statistic:
    """Creates the Pearson correlation of (N,) values.

    For constant values, of a split or of a resample, the correlation is defined as 0, never NaN.
    """
    x, y = _centred(truth), _centred(given)
    columns = np.stack([x, y, x * x, y * y, x * y], 1)

    def metric(counts: np.ndarray) -> np.ndarray:
        sizes = counts.sum(1)
        x, y, xx, yy, xy = (counts @ columns).T / sizes
        spread_x, spread_y = xx - x * x, yy - y * y
        # Relative to the second moment: smaller spreads are the rounding errors of a constant resample.
        varies = (spread_x > 1e-12 * xx) & (spread_y > 1e-12 * yy)
        scale = np.sqrt(np.where(varies, spread_x * spread_y, 1.0))
        return np.where(varies, np.clip((xy - x * y) / scale, -1, 1), 0.0)

    return metric


def spearman(truth: np.ndarray, given: np.ndarray) -> Statistic:
    """Creates the Spearman correlation of (N,) values: the Pearson correlation of their ranks, with mean ranks for ties.

    Ranks are computed once, over the whole split, and resampled with the examples. This is exact for the split and a close
    approximation for the interval, which saves ranking every resample.
    """
    from scipy.stats import rankdata

    return pearson(rankdata(truth), rankdata(given))


def indicators(rows: Sequence[Sequence[str]], labels: Sequence[str]) -> np.ndarray:
    """Returns (N, C) indicators of the labels of each row."""
    place = {label: number for number, label in enumerate(labels)}
    found = np.zeros((len(rows), len(labels)), bool)
    for number, row in enumerate(rows):
        found[number, [place[label] for label in row]] = True
    return found


def _centred(values: np.ndarray) -> np.ndarray:
    """Subtracts the mean, so that sums of squares lose no precision; returns zeros if all values are nearly equal."""
    mean = values.mean()
    centred = np.asarray(values, np.float64) - mean
    nearly_constant = np.linalg.norm(centred) <= NEARLY_CONSTANT * abs(mean)
    return np.zeros_like(centred) if nearly_constant else centred
