"""The estimate from a sample is unbiased, costs what was asked for, and varies little."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtune.components.evaluate.sampling import TextSample, draw_examples, draw_text, inclusion, systematic

positive = st.floats(0.1, 100)
units = st.lists(st.tuples(positive, positive, st.floats(-5, 5)), min_size=1, max_size=12)


@settings(max_examples=50)
@given(units=units, share=st.floats(0.05, 1.2))
def test_the_estimate_is_unbiased_whatever_the_sizes(units: list[tuple[float, float, float]], share: float) -> None:
    """The mean over all starts is exact: the sample changes only where a place crosses the end of a unit."""
    sizes, costs, values = np.array(units).T
    probability = inclusion(sizes, costs, share * costs.sum())
    changes = np.unique(np.round(np.concatenate([[0.0, 1.0], np.cumsum(probability) % 1]), 8))
    drawn = np.zeros(len(sizes))
    of_values = 0.0
    for start, end in pairwise(changes):
        chosen = systematic(probability, (start + end) / 2)
        drawn[chosen] += end - start
        of_values += (end - start) * float((values[chosen] / probability[chosen]).sum())
        assert (sizes[chosen] / probability[chosen]).sum() == pytest.approx(sizes.sum())  # the bytes are always known
    assert drawn == pytest.approx(probability, abs=1e-6)
    assert of_values == pytest.approx(values.sum(), abs=1e-6 * np.abs(values / probability).sum())


@given(units=units, share=st.floats(0.05, 1.2))
def test_the_expected_cost_keeps_to_the_budget(units: list[tuple[float, float, float]], share: float) -> None:
    sizes, costs, _ = np.array(units).T
    probability = inclusion(sizes, costs, share * costs.sum())
    assert (probability > 0).all()
    assert (probability <= 1).all()
    assert probability.sum() == pytest.approx(round(probability.sum()))
    certain = (probability > 1 - 1e-9).sum()
    if probability.sum() > certain + 1.5:  # one of the others is always drawn, whatever it costs
        assert probability @ costs <= share * costs.sum() * (1 + 1e-6)


def made(max_tokens: int | None, passes: int | None = None, seed: int = 0, documents: int = 200) -> TextSample:
    lengths = np.random.default_rng(1).integers(0, 3000, documents)
    return draw_text(lengths, 4 * lengths, 128, max_tokens, passes, seed)


@pytest.mark.parametrize("passes", [None, 7])
def test_everything_is_read_once_without_a_budget(passes: int | None) -> None:
    whole = made(None, passes)
    assert (whole.probability == 1).all()
    assert len(set(zip(whole.document, whole.window, whole.turn, strict=True))) == len(whole)
    assert set(whole.document) == set(range(200))
    lengths = np.random.default_rng(1).integers(0, 3000, 200)
    assert np.bincount(whole.document, whole.num_bytes) == pytest.approx(4 * lengths)
    costs = len(whole) * 128  # at most
    for enough in (10**9, int(costs / 1.05)):
        assert np.array_equal(made(enough, passes).window, whole.window)


@pytest.mark.parametrize(("passes", "seed"), [(None, 0), (None, 1), (7, 0)])
def test_the_sample_costs_what_was_asked_for_and_is_spread_over_the_documents(passes: int | None, seed: int) -> None:
    sample = made(20_000, passes, seed)
    assert 0.9 * 20_000 / 128 < len(sample) < 1.1 * 20_000 / 120
    assert sample.documents_in_split == 200
    assert len(np.unique(sample.document)) > 0.6 * len(sample)
    if passes:  # more windows with one pass each, not fewer windows with all passes
        assert len(set(zip(sample.document, sample.window, strict=True))) == len(sample)


def test_the_sample_is_a_function_of_the_data_alone() -> None:
    one, same, other = made(20_000), made(20_000), made(20_000, seed=1)
    assert np.array_equal(one.document, same.document)
    assert np.array_equal(one.window, same.window)
    assert not np.array_equal(one.document[:50], other.document[:50])


def test_the_estimate_varies_only_as_the_units_do() -> None:
    """With the same bits per byte everywhere, every sample gives the value of the whole split."""
    for seed in range(5):
        sample = made(5_000, seed=seed)
        nats = 0.7 * sample.num_bytes
        assert (nats / sample.probability).sum() / (sample.num_bytes / sample.probability).sum() == pytest.approx(0.7)


@pytest.mark.parametrize(("examples", "asked", "read"), [(1000, 300, 300), (1000, 910, 1000), (7, 1000, 7)])
def test_examples_are_drawn_with_the_labels_in_their_shares(examples: int, asked: int, read: int) -> None:
    labels = np.random.default_rng(1).choice(3, examples, p=[0.7, 0.2, 0.1])
    ids = [f"example {number}" for number in range(examples)]
    drawn = draw_examples(ids, labels, asked)
    assert drawn.sum() == read
    expected = np.bincount(labels) * read / examples
    assert np.abs(np.bincount(labels[drawn]) - expected).max() <= 1
    assert np.array_equal(drawn, draw_examples(ids, labels, asked))
    assert read == examples or not np.array_equal(drawn, draw_examples(ids, labels, asked, seed=1))


def test_each_example_is_equally_likely_to_be_drawn() -> None:
    labels = np.repeat([0, 1, 2], [50, 9, 1])
    ids = [str(number) for number in range(60)]
    shares = np.mean([draw_examples(ids, labels, 20, seed) for seed in range(2000)], 0)
    assert shares == pytest.approx(np.full(60, 1 / 3), abs=0.05)  # standard error 0.011


def test_the_windows_of_an_example_are_drawn_together() -> None:
    windows = np.repeat(np.arange(50), np.random.default_rng(0).integers(1, 5, 50))
    drawn = draw_examples([str(number) for number in windows], np.full(len(windows), -1), 20)
    assert len(set(windows[drawn])) == 20
    assert not set(windows[drawn]) & set(windows[~drawn])
