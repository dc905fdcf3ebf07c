"""Intervals against known values and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score

from mixtune.components.compare.statistics import Bootstrap, Value

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
    labels = draw.integers(0, 3, 50)
    nothing = Value(0.0, 0.0, 0.0)
    assert DRAW.forgetting(nats, nats, num_bytes) == nothing
    assert DRAW.mean_difference(scores, scores) == nothing
    assert DRAW.macro_f1_difference(labels, scores, scores) == nothing


def test_one_observation_is_its_own_interval() -> None:
    one = np.array([4.0])
    assert DRAW.mean(one) == Value(4.0, 4.0, 4.0)
    assert DRAW.forgetting(one, one - 1, np.array([2])) == Value(*[1 / 2 / math.log(2)] * 3)
    assert DRAW.macro_f1(np.array([0]), np.array([0])) == Value(1.0, 1.0, 1.0)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        DRAW.mean(np.array([]))


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    sample = np.random.default_rng(0).normal(0, 1, 100)
    assert DRAW.mean(sample) == DRAW.mean(sample)
    assert DRAW.mean(sample) != Bootstrap(2, 2000, 0.95).mean(sample)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_macro_f1_is_that_of_scikit_learn(num_classes: int) -> None:
    draw = np.random.default_rng(num_classes)
    references = draw.integers(0, num_classes, 80)
    predictions = np.where(draw.uniform(size=80) < 0.6, references, draw.integers(0, num_classes, 80))
    value = DRAW.macro_f1(references, predictions)
    assert value.value == pytest.approx(f1_score(references, predictions, average="macro"))
    by_hand = [
        f1_score(references[chosen], predictions[chosen], average="macro")
        for chosen in np.random.default_rng(5).integers(0, 80, (2000, 80))
    ]
    low, high = np.percentile(by_hand, [2.5, 97.5])
    assert [value.low, value.high] == pytest.approx([low, high], abs=0.02)


def test_macro_f1_of_constant_predictions() -> None:
    references = np.repeat([0, 1, 2, 3], 25)
    value = DRAW.macro_f1(references, np.zeros(100, int))
    assert value.value == pytest.approx((2 * 25 / 125) / 4)
    assert value.low < value.value < value.high


def test_macro_f1_difference_is_the_difference_of_the_two() -> None:
    draw = np.random.default_rng(0)
    references, ours, theirs = draw.integers(0, 3, (3, 60))
    difference = DRAW.macro_f1_difference(references, ours, theirs)
    parts = [f1_score(references, predictions, average="macro") for predictions in (ours, theirs)]
    assert difference.value == pytest.approx(parts[0] - parts[1])
    assert difference.low < difference.value < difference.high


def test_a_large_sample_is_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = np.random.default_rng(0).normal(0, 1, 500)
    whole = DRAW.mean(sample)
    monkeypatch.setattr("mixtune.components.compare.statistics.CELLS_AT_ONCE", 5000)
    parts = DRAW.mean(sample)
    assert [parts.low, parts.high] == pytest.approx([whole.low, whole.high], abs=0.02)
