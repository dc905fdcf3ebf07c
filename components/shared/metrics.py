"""Metrics that are defined for a whole split, from statistics of its examples that are summed.

`evaluate` computes a metric over a split, and `compare` over resamples of it. Both sum the same statistics, each example as
often as it is drawn. Metrics that are means over examples need no function here. Shapes: S resamples, N examples, C classes or
labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

NEARLY_CONSTANT = float(np.finfo(np.float64).eps ** 0.75)
"""Relative spread below which values count as constant, as in scipy: smaller spreads are rounding errors."""
BLEU_ORDER = 4
CHRF_BETA = 2.0

Statistic: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Maps (S, N) counts of each example in each resample to the (S,) metric of each resample."""


def split_statistic(metric: str, rows: Sequence[Mapping[str, Any]]) -> Statistic | None:
    """Returns a metric of these examples as a function of counts; None if it is a mean over examples.

    Args:
        metric: name of the metric.
        rows: `reference` and `prediction` of each example; for BLEU and chrF `bleu_counts` and `chrf_counts`.
    """
    if metric in _OF_COUNTS:
        return _OF_COUNTS[metric](np.array([row[f"{metric}_counts"] for row in rows], np.float64))
    columns = [[row[name] for row in rows] for name in ("reference", "prediction")]
    if metric in _OF_NUMBERS:
        return _OF_NUMBERS[metric](*(np.array(column, np.float64) for column in columns))
    if metric in _OF_LABELS:
        return _OF_LABELS[metric](*indicators(*columns))
    return None


def over_split(statistic: Statistic, size: int) -> float:
    """Returns the metric over the split itself, in which each of the N examples occurs once."""
    return float(statistic(np.ones((1, size)))[0])


def indicators(*columns: Sequence[str | Sequence[str]]) -> list[np.ndarray]:
    """Returns (N, C) indicators for each column of labels, or of lists of labels. C covers the labels of all columns."""
    rows = [[[one] if isinstance(one, str) else one for one in column] for column in columns]
    labels = sorted({label for column in rows for inside in column for label in inside})
    index = {label: number for number, label in enumerate(labels)}
    found = []
    for column in rows:
        indicator = np.zeros((len(column), len(labels)), bool)
        for number, inside in enumerate(column):
            indicator[number, [index[label] for label in inside]] = True
        found.append(indicator)
    return found


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


def bleu(counts_of_each: np.ndarray) -> Statistic:
    """Creates BLEU in 0..1 with sacrebleu, from (N, 10) counts per example that are summed over a resample.

    As sacrebleu's own paired bootstrap (P. Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation).
    """

    def metric(counts: np.ndarray) -> np.ndarray:
        sums = np.rint(counts @ counts_of_each).astype(np.int64).tolist()
        return np.array([bleu_of_counts(row) for row in sums])

    return metric


def bleu_of_counts(counts: Sequence[int], effective_order: bool = False) -> float:
    """Returns BLEU in 0..1 from (10,) counts: lengths of answer and reference, matching n-grams, n-grams of the answer.

    Args:
        effective_order: whether to leave out n-grams that are longer than the answer, as for single sentences.
    """
    from sacrebleu.metrics.bleu import BLEU

    answer, reference, *ngrams = counts
    correct, total = list(ngrams[:BLEU_ORDER]), list(ngrams[BLEU_ORDER:])
    return BLEU.compute_bleu(correct, total, answer, reference, "exp", effective_order=effective_order).score / 100


def chrf(counts_of_each: np.ndarray) -> Statistic:
    """Creates chrF in 0..1 from (N, 18) counts per example, as sacrebleu counts them, that are summed over a resample.

    For n = 1..6, precision and recall of the character n-grams; their means over the n that both texts have; of these F_2
    (M. Popović 2015, chrF: character n-gram F-score for automatic MT evaluation).
    """

    def metric(counts: np.ndarray) -> np.ndarray:
        ours, theirs, match = np.moveaxis((counts @ counts_of_each).reshape(len(counts), -1, 3), 2, 0)
        present = (ours > 0) & (theirs > 0)
        orders = np.maximum(present.sum(1), 1)
        precision, recall = (
            (np.where(present, match, 0) / np.where(present, size, 1)).sum(1) / orders for size in (ours, theirs)
        )
        scale = CHRF_BETA**2 * precision + recall
        return (1 + CHRF_BETA**2) * precision * recall / np.where(scale > 0, scale, 1)

    return metric


_OF_LABELS: dict[str, Callable[[np.ndarray, np.ndarray], Statistic]] = {"micro_f1": micro_f1, "macro_f1": macro_f1}
_OF_NUMBERS: dict[str, Callable[[np.ndarray, np.ndarray], Statistic]] = {"pearson": pearson, "spearman": spearman}
_OF_COUNTS: dict[str, Callable[[np.ndarray], Statistic]] = {"bleu": bleu, "chrf": chrf}


def _centred(values: np.ndarray) -> np.ndarray:
    """Subtracts the mean, so that sums of squares lose no precision; returns zeros if all values are nearly equal."""
    mean = values.mean()
    centred = np.asarray(values, np.float64) - mean
    nearly_constant = np.linalg.norm(centred) <= NEARLY_CONSTANT * abs(mean)
    return np.zeros_like(centred) if nearly_constant else centred
