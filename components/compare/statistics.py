"""Intervals from the paired percentile bootstrap, which resamples documents or examples and keeps candidates paired.

All intervals use the same seed, so that equal inputs give equal intervals and differences of samples of one size use the same
resamples. B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Means are resampled directly;
metrics of a whole split (F1, correlations, BLEU) from sums over the resampled examples, with `shared/metrics.py`. Documents or
examples of a group, such as an author, are resampled together (A. Davison and D. Hinkley, Bootstrap Methods and their
Application (1997), section 3.8): what one author wrote is alike, and says less than as many independent texts. Shapes: N
documents or examples, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..shared.metrics import Statistic

CELLS_AT_ONCE = 1 << 22  # resampled values held in memory at a time


@dataclass(frozen=True)
class Value:
    """A measured value with its interval.

    Attributes:
        replicates: (R,) the values in the resamples; None if there is nothing to resample.
    """

    value: float
    low: float
    high: float
    replicates: np.ndarray | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, float]:
        """Returns the value in the format of `report.json`."""
        return {"value": self.value, "low": self.low, "high": self.high}


def clusters(names: Sequence[str | None]) -> np.ndarray | None:
    """Returns the (N,) number of the group of each document or example; None if none has a group.

    One without a group is its own.
    """
    if not any(name is not None for name in names):
        return None
    numbers: dict[str | int, int] = {}
    keys = (index if name is None else name for index, name in enumerate(names))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def simultaneous(values: Sequence[Value], coverage: float) -> list[Value]:
    """Widens intervals so that all of them together cover their true values with the given probability.

    Simultaneous percentile intervals (M. Mandel and R. Betensky 2008, Simultaneous confidence intervals based on the percentile
    bootstrap approach, Computational Statistics & Data Analysis 52): a resample lies within all intervals if its most extreme
    rank among the candidates does. Candidates that are alike cost little, since their values are extreme in the same
    resamples. The values must come from the same resamples. Those without resamples stay as they are, and so does a single one.
    """
    places = [number for number, value in enumerate(values) if value.replicates is not None]
    if len(places) < 2:
        return list(values)
    drawn = np.stack([values[place].replicates for place in places])  # type: ignore[misc]
    ordered = np.sort(drawn, 1)
    size = drawn.shape[1]
    # Number of resamples that lie strictly beyond a value, on the side where fewer do.
    below = np.stack([np.searchsorted(row, one, side="left") for row, one in zip(ordered, drawn, strict=True)])
    above = size - np.stack([np.searchsorted(row, one, side="right") for row, one in zip(ordered, drawn, strict=True)])
    extreme = np.sort(np.maximum(below, above).max(0))
    last = int(extreme[math.ceil(coverage * size) - 1])
    found = list(values)
    for place, row in zip(places, ordered, strict=True):
        old = values[place]
        low, high = float(row[size - 1 - last]), float(row[last])
        found[place] = Value(old.value, min(low, old.low), max(high, old.high), old.replicates)
    return found


@dataclass(frozen=True)
class Bootstrap:
    """Computes bootstrap intervals. All methods take the `groups` of the documents or examples, as `clusters` numbers them.

    Attributes:
        seed: seed of the resamples.
        resamples: R, number of resamples.
        coverage: coverage of the intervals, such as 0.95.
    """

    seed: int
    resamples: int
    coverage: float

    def bits_per_byte(self, nats: np.ndarray, num_bytes: np.ndarray, groups: np.ndarray | None = None) -> Value:
        """Computes Σ nats / (ln 2 · Σ bytes), a ratio of sums over documents.

        Args:
            nats: (N,) loss of each document, summed over its tokens.
            num_bytes: (N,) UTF-8 bytes of each document.
        """
        return self._ratio(nats, math.log(2) * np.asarray(num_bytes, np.float64), groups)

    def forgetting(
        self, nats: np.ndarray, nats_before: np.ndarray, num_bytes: np.ndarray, groups: np.ndarray | None = None
    ) -> Value:
        """Computes ΔBPB, paired by document: Σ (nats - nats before) / (ln 2 · Σ bytes).

        Args:
            nats: (N,) loss of each document under the candidate.
            nats_before: (N,) loss of each document under the pretrained model.
            num_bytes: (N,) UTF-8 bytes of each document.
        """
        return self.bits_per_byte(np.asarray(nats) - np.asarray(nats_before), num_bytes, groups)

    def per_token(self, nats: np.ndarray, tokens: np.ndarray) -> Value:
        """Computes Σ nats / Σ tokens, a ratio of sums over examples.

        Args:
            nats: (N,) sum over the tokens of each example.
            tokens: (N,) tokens of each example.
        """
        return self._ratio(nats, np.asarray(tokens, np.float64), None)

    def mean(self, scores: np.ndarray, groups: np.ndarray | None = None) -> Value:
        """Computes the mean of (N,) scores of examples."""
        if groups is None:
            return self._interval(_mean, np.asarray(scores, np.float64))
        return self._ratio(scores, np.ones(len(scores)), groups)

    def mean_difference(self, scores: np.ndarray, baseline: np.ndarray, groups: np.ndarray | None = None) -> Value:
        """Computes the mean of the differences of (N,) scores, paired by example."""
        return self.mean(np.asarray(scores) - np.asarray(baseline), groups)

    def of_split(self, metric: Statistic, size: int, groups: np.ndarray | None = None) -> Value:
        """Computes a metric that is defined for a whole split.

        Args:
            metric: a statistic of `shared/metrics.py`.
            size: N.
        """
        count = size if groups is None else int(groups.max()) + 1
        return self._interval(_of_indices(metric, count, groups), np.arange(count))

    def difference(self, metric: Statistic, baseline: Statistic, size: int, groups: np.ndarray | None = None) -> Value:
        """Computes the difference of two candidates' metrics, paired by example: both use the same resamples."""

        def between(counts: np.ndarray) -> np.ndarray:
            return metric(counts) - baseline(counts)

        return self.of_split(between, size, groups)

    def _ratio(self, above: np.ndarray, below: np.ndarray, groups: np.ndarray | None) -> Value:
        """Computes Σ above / Σ below; with groups, from the sums over each group."""
        if groups is None:
            return self._interval(_ratio, np.asarray(above, np.float64), below)
        return self._interval(_ratio, np.bincount(groups, above), np.bincount(groups, below))

    def _interval(self, statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> Value:
        """Computes the percentile interval. A single observation cannot be resampled; its interval is the value itself."""
        from scipy.stats import bootstrap

        size = len(samples[0])
        if size == 0:
            raise ValueError("nothing was measured")
        value = float(statistic(*samples, axis=-1))
        if size == 1:
            return Value(value, value, value)
        found = bootstrap(
            samples,
            statistic,
            paired=True,
            vectorized=True,
            axis=-1,
            n_resamples=self.resamples,
            batch=max(1, CELLS_AT_ONCE // size),
            confidence_level=self.coverage,
            method="percentile",
            rng=np.random.default_rng(self.seed),
        )
        low, high = map(float, found.confidence_interval)
        return Value(value, low, high, found.bootstrap_distribution)


def _mean(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    return scores.mean(axis)


def _ratio(above: np.ndarray, below: np.ndarray, axis: int = -1) -> np.ndarray:
    return above.sum(axis) / below.sum(axis)


def _of_indices(metric: Statistic, size: int, groups: np.ndarray | None) -> Callable[..., np.ndarray]:
    """Converts a metric to a function of resampled indices of examples, or of groups, as scipy draws them."""

    def of_indices(indices: np.ndarray, axis: int = -1) -> np.ndarray:
        rows = np.moveaxis(np.atleast_2d(indices), axis, -1)
        places = rows + size * np.arange(len(rows))[:, None]
        counts = np.bincount(places.ravel(), minlength=size * len(rows)).reshape(len(rows), size)
        found = metric((counts if groups is None else counts[:, groups]).astype(np.float64))
        return found if indices.ndim > 1 else found[0]

    return of_indices
