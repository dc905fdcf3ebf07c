"""Intervals against known values and scikit-learn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import sacrebleu
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score

from mixtune.components.compare.statistics import Bootstrap, Value
from mixtune.components.evaluate.texts import Overlap
from mixtune.components.shared.metrics import Statistic, bleu, macro_f1, micro_f1, pearson, spearman
from tests.components.shared.test_metrics import ANSWERS, REFERENCES

DRAW = Bootstrap(seed=1, resamples=2000, coverage=0.95)


def test_bits_per_byte_is_a_ratio_of_sums() -> None:
    value = DRAW.bits_per_byte(np.array([1.0, 3.0]), np.array([2, 6])).value
    assert value == pytest.approx(4 / 8 / math.log(2))


def test_interval_of_a_mean_is_the_textbook_one() -> None:
    sample = np.random.default_rng(0).normal(3, 2, 4000)
    value = DRAW.mean(sample)
    error = 1.96 * sample.std() / math.sqrt(len(sample))
    assert value.value == pytest.approx(sample.mean())
    assert value.low == pytest.approx(sample.mean() - error, abs=0.1 * error)
    assert value.high == pytest.approx(sample.mean() + error, abs=0.1 * error)


def test_wider_coverage_gives_a_wider_interval() -> None:
    sample = np.random.default_rng(0).normal(0, 1, 100)
    narrow, wide = (Bootstrap(1, 2000, coverage).mean(sample) for coverage in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairing_removes_what_documents_have_in_common() -> None:
    """Documents differ much more than the two models do; unpaired intervals would hide the difference."""
    draw = np.random.default_rng(0)
    num_bytes = draw.integers(100, 900, 200)
    before = num_bytes * draw.uniform(0.2, 2.0, 200)
    after = before + 0.05 * num_bytes + draw.normal(0, 0.5, 200)
    paired = DRAW.forgetting(after, before, num_bytes)
    alone = DRAW.bits_per_byte(after, num_bytes)
    assert paired.low > 0
    assert paired.value == pytest.approx(0.05 / math.log(2), rel=0.05)
    assert paired.high - paired.low < (alone.high - alone.low) / 10


def test_identical_models_differ_by_exactly_nothing() -> None:
    draw = np.random.default_rng(0)
    nats, num_bytes, scores = draw.uniform(1, 9, 50), draw.integers(1, 99, 50), draw.integers(0, 2, 50)
    nothing = Value(0.0, 0.0, 0.0)
    assert DRAW.forgetting(nats, nats, num_bytes) == nothing
    assert DRAW.mean_difference(scores, scores) == nothing


def test_one_observation_is_its_own_interval() -> None:
    one = np.array([4.0])
    assert DRAW.mean(one) == Value(4.0, 4.0, 4.0)
    assert DRAW.forgetting(one, one - 1, np.array([2])) == Value(*[1 / 2 / math.log(2)] * 3)
    right = np.array([[True, False]])
    assert DRAW.of_split(macro_f1(right, right), 1) == Value(1.0, 1.0, 1.0)
    assert DRAW.of_split(pearson(one, one), 1) == Value(0.0, 0.0, 0.0)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        DRAW.mean(np.array([]))


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    sample = np.random.default_rng(0).normal(0, 1, 100)
    assert DRAW.mean(sample) == DRAW.mean(sample)
    assert DRAW.mean(sample) != Bootstrap(2, 2000, 0.95).mean(sample)


def one_hot(classes: np.ndarray) -> np.ndarray:
    return classes[:, None] == np.arange(6)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_macro_f1_of_classes_is_that_of_scikit_learn(num_classes: int) -> None:
    draw = np.random.default_rng(num_classes)
    references = draw.integers(0, num_classes, 80)
    predictions = np.where(draw.uniform(size=80) < 0.6, references, draw.integers(0, num_classes, 80))
    value = DRAW.of_split(macro_f1(one_hot(references), one_hot(predictions)), 80)
    assert value.value == pytest.approx(f1_score(references, predictions, average="macro"))
    by_hand = [
        f1_score(references[chosen], predictions[chosen], average="macro")
        for chosen in np.random.default_rng(5).integers(0, 80, (2000, 80))
    ]
    low, high = np.percentile(by_hand, [2.5, 97.5])
    assert [value.low, value.high] == pytest.approx([low, high], abs=0.02)


def test_macro_f1_of_constant_predictions() -> None:
    references = np.repeat([0, 1, 2, 3], 25)
    value = DRAW.of_split(macro_f1(one_hot(references), one_hot(np.zeros(100, int))), 100)
    assert value.value == pytest.approx((2 * 25 / 125) / 4)
    assert value.low < value.value < value.high


def test_macro_f1_difference_is_the_difference_of_the_two() -> None:
    draw = np.random.default_rng(0)
    references, ours, theirs = draw.integers(0, 3, (3, 60))
    one, other = (macro_f1(one_hot(references), one_hot(predictions)) for predictions in (ours, theirs))
    difference = DRAW.difference(one, other, 60)
    parts = [f1_score(references, predictions, average="macro") for predictions in (ours, theirs)]
    assert difference.value == pytest.approx(parts[0] - parts[1])
    assert difference.low < difference.value < difference.high


def test_the_interval_of_a_bleu_difference_is_paired() -> None:
    answers, references = ANSWERS[0] * 12, REFERENCES[0] * 12
    overlap = Overlap(references)
    worse = [answer if i % 20 else answer[:-3] + "?" for i, answer in enumerate(answers)]
    one, other = (
        bleu(np.array([overlap.of_example(*pair)["bleu_counts"] for pair in zip(given, references, strict=True)]))
        for given in (answers, worse)
    )
    difference = DRAW.difference(one, other, len(answers))
    scores = [sacrebleu.corpus_bleu(given, [references]).score / 100 for given in (answers, worse)]
    assert difference.value == pytest.approx(scores[0] - scores[1])
    assert 0 <= difference.low < difference.value < difference.high
    alone = DRAW.of_split(one, len(answers))
    assert difference.high - difference.low < alone.high - alone.low


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, 1e9])
@pytest.mark.parametrize("metric", [pearson, spearman])
def test_what_is_constant_correlates_with_nothing(metric: Callable[..., Statistic], constant: float) -> None:
    values, same = np.random.default_rng(0).normal(size=37), np.full(37, constant)
    for truth, guess in ((values, same), (same, values), (same, same)):
        assert DRAW.of_split(metric(truth, guess), 37) == Value(0.0, 0.0, 0.0)


def test_a_correlations_interval_is_that_of_drawing_it_anew() -> None:
    draw = np.random.default_rng(0)
    truth = draw.normal(size=120)
    ours, theirs = (truth + noise * draw.normal(size=120) for noise in (0.7, 1.5))
    chosen = np.random.default_rng(5).integers(0, 120, (2000, 120))
    for metric, of, close in ((pearson, pearsonr, 0.02), (spearman, spearmanr, 0.03)):
        value = DRAW.of_split(metric(truth, ours), 120)
        by_hand = [of(truth[one], ours[one]).statistic for one in chosen]
        assert [value.low, value.high] == pytest.approx(list(np.percentile(by_hand, [2.5, 97.5])), abs=close)
        difference = DRAW.difference(metric(truth, ours), metric(truth, theirs), 120)
        apart = [of(truth[one], ours[one]).statistic - of(truth[one], theirs[one]).statistic for one in chosen]
        assert difference.value == pytest.approx(of(truth, ours).statistic - of(truth, theirs).statistic)
        assert [difference.low, difference.high] == pytest.approx(list(np.percentile(apart, [2.5, 97.5])), abs=close)
        paired = difference.high - difference.low
        unpaired = (value.high - value.low) + paired
        assert 0 < paired < unpaired


def test_metrics_of_a_split_are_drawn_in_about_a_second() -> None:
    draw = np.random.default_rng(0)
    truth, ours, theirs = draw.normal(size=(3, 1000))
    labels, guess, other = draw.uniform(size=(3, 1000, 20)) < 0.2
    pairs = [(metric(truth, ours), metric(truth, theirs)) for metric in (pearson, spearman)]
    pairs += [(metric(labels, guess), metric(labels, other)) for metric in (micro_f1, macro_f1)]
    for one, another in pairs:
        started = time.process_time()
        DRAW.difference(one, another, 1000)
        assert time.process_time() - started < 3


def test_a_large_sample_is_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = np.random.default_rng(0).normal(0, 1, 500)
    whole = DRAW.mean(sample)
    monkeypatch.setattr("mixtune.components.compare.statistics.CELLS_AT_ONCE", 5000)
    parts = DRAW.mean(sample)
    assert [parts.low, parts.high] == pytest.approx([whole.low, whole.high], abs=0.02)
