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

from mixtune.components.compare.statistics import Bootstrap, Value, clusters, simultaneous
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
    assert DRAW.forgetting(one, one - 1, np.array([2])) == Value(
        1 / 2 / math.log(2), 1 / 2 / math.log(2), 1 / 2 / math.log(2)
    )
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


def test_members_of_a_group_count_once() -> None:
    """Copies of an observation in one group say no more than the observation."""
    draw = np.random.default_rng(0)
    scores, nats, num_bytes = draw.normal(0, 1, 60), draw.uniform(1, 9, 60), draw.integers(1, 99, 60)
    groups = np.repeat(np.arange(60), 3)
    alone, copied = DRAW.mean(scores), DRAW.mean(np.repeat(scores, 3), groups)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
    assert DRAW.mean(np.repeat(scores, 3)).high < alone.high
    text, copies = (
        DRAW.bits_per_byte(nats, num_bytes),
        DRAW.bits_per_byte(np.repeat(nats, 3), np.repeat(num_bytes, 3), groups),
    )
    assert copies.to_json() == pytest.approx(text.to_json())
    truth, given = draw.uniform(size=(2, 60, 3)) < 0.5
    one = DRAW.of_split(micro_f1(truth, given), 60)
    all_copies = DRAW.of_split(micro_f1(np.repeat(truth, 3, 0), np.repeat(given, 3, 0)), 180, groups)
    assert all_copies.to_json() == pytest.approx(one.to_json())


def test_groups_are_numbered_and_the_ungrouped_are_their_own() -> None:
    found = clusters(["b", None, "a", "b", None])
    assert found is not None
    assert found.tolist() == [0, 1, 2, 0, 3]
    assert clusters([None, None]) is None


def estimates(shared: float, candidates: int, seed: int) -> list[Value]:
    """Means of normal samples around 0, correlated between candidates; the normal model takes the place of resampling."""
    draw = np.random.default_rng(seed)
    errors = shared * draw.normal(size=1001) + math.sqrt(1 - shared**2) * draw.normal(size=(candidates, 1001))
    found = []
    for row in errors:
        replicates = row[0] + row[1:]
        low, high = np.percentile(replicates, [2.5, 97.5]).tolist()
        found.append(Value(row[0], low, high, replicates))
    return found


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_simultaneous_intervals_hold_together(shared: float) -> None:
    trials = 300
    alone = together = 0
    for seed in range(trials):
        values = estimates(shared, 8, seed)
        alone += all(one.low <= 0 <= one.high for one in values)
        together += all(one.low <= 0 <= one.high for one in simultaneous(values, 0.95))
    assert together / trials > 0.92
    assert alone / trials < 0.87


def test_candidates_that_are_alike_cost_nothing() -> None:
    (one,) = estimates(0.0, 1, seed=0)
    other = estimates(0.0, 1, seed=5)[0]
    fixed = Value(0.0, 0.0, 0.0)
    same = simultaneous([one, one, fixed], 0.95)
    assert (same[0].low, same[0].high) == pytest.approx((one.low, one.high), abs=0.02)
    assert same[2] is fixed
    assert simultaneous([one, fixed], 0.95) == [one, fixed]
    wider = simultaneous([one, other], 0.95)
    assert wider[0].low < one.low < one.high < wider[0].high
    assert [value.value for value in wider] == [one.value, other.value]
