"""Metrics of a split and of its resamples, against scikit-learn, scipy and sacrebleu."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from scipy.stats import DegenerateDataWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, root_mean_squared_error
from sklearn.preprocessing import MultiLabelBinarizer

from mixtune.components.evaluate.scores import split_scores
from mixtune.components.evaluate.texts import Overlap
from mixtune.components.shared.config import Task
from mixtune.components.shared.metrics import (
    Statistic,
    macro_f1,
    micro_f1,
    over_split,
    pearson,
    spearman,
    split_statistic,
)

NAMES = ("kfp", "mlflow", "pandas", "rich")


def statistic(metric: str, rows: Sequence[dict[str, Any]]) -> Statistic:
    found = split_statistic(metric, rows)
    assert found is not None
    return found


def rows_of(references: Sequence[Any], predictions: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"reference": reference, "prediction": prediction}
        for reference, prediction in zip(references, predictions, strict=True)
    ]


def scores(kind: Task, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The scores of `evaluate`. What `compare` resamples gives the same numbers over the split itself."""
    found = split_scores(kind, rows)
    for metric, score in found.items():
        of_resamples = split_statistic(metric, rows)
        assert score is not None
        assert of_resamples is None or over_split(of_resamples, len(rows)) == score
    return {metric: score for metric, score in found.items() if score is not None}


def resampled(counts: np.ndarray) -> np.ndarray:
    """The indices of one resample, as counts say it."""
    return np.repeat(np.arange(len(counts)), counts.astype(int))


@given(
    truth=hypothesis_numpy.arrays(bool, st.tuples(st.integers(1, 12), st.just(3))),
    seed=st.integers(0, 2**32 - 1),
)
def test_f1_over_labels_is_that_of_scikit_learn_in_every_resample(truth: np.ndarray, seed: int) -> None:
    draw = np.random.default_rng(seed)
    guess = truth ^ (draw.uniform(size=truth.shape) < 0.3)
    counts = np.stack([np.ones(len(truth)), draw.multinomial(len(truth), np.full(len(truth), 1 / len(truth)))])
    for average, metric in (("micro", micro_f1(truth, guess)), ("macro", macro_f1(truth, guess))):
        for found, row in zip(metric(counts.astype(float)), counts, strict=True):
            ours, theirs = truth[resampled(row)], guess[resampled(row)]
            expected = f1_score(ours, theirs, average=average, zero_division=np.nan) if (ours | theirs).any() else 0.0
            assert found == pytest.approx(expected)


CLASSES = st.sampled_from(NAMES)
"""Few classes in short lists: some are missing, all predictions can be equal, and there can be one class only."""


@given(st.lists(st.tuples(CLASSES, CLASSES), min_size=1, max_size=15))
def test_classification_is_that_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    references, predictions = zip(*pairs, strict=True)
    assert scores("classification", rows_of(references, predictions)) == pytest.approx(
        {
            "accuracy": accuracy_score(references, predictions),
            "macro_f1": f1_score(references, predictions, average="macro", zero_division=0),
        }
    )


LABELS = st.lists(CLASSES, unique=True).map(sorted)


@given(st.lists(st.tuples(LABELS, LABELS), min_size=1, max_size=15))
def test_multi_label_is_that_of_scikit_learn(pairs: list[tuple[list[str], list[str]]]) -> None:
    references, predictions = zip(*pairs, strict=True)
    # One more column that is never set: scikit-learn would take a single label for a binary task.
    binarizer = MultiLabelBinarizer(classes=[*NAMES, "none"])
    truth, guess = (binarizer.fit_transform(column) for column in (references, predictions))
    labelled = (truth | guess).any()
    assert scores("multi_label", rows_of(references, predictions)) == pytest.approx(
        {
            "micro_f1": f1_score(truth, guess, average="micro", zero_division=0),
            "macro_f1": f1_score(truth, guess, average="macro", zero_division=np.nan) if labelled else 0.0,
            "exact_match": accuracy_score(truth, guess),
        }
    )


NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, -7.0]), st.integers(-8000, 8000).map(lambda number: number / 8))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=15))
def test_regression_is_that_of_scipy_and_scikit_learn(pairs: list[tuple[float, float]]) -> None:
    """With ties, and with constant values, for which mixtune defines a correlation of 0."""
    references, predictions = (list(column) for column in zip(*pairs, strict=True))
    varies = len(set(references)) > 1 and len(set(predictions)) > 1
    assert scores("regression", rows_of(references, predictions)) == pytest.approx(
        {
            "pearson": pearsonr(references, predictions).statistic if varies else 0.0,
            "spearman": spearmanr(references, predictions).statistic if varies else 0.0,
            "mae": mean_absolute_error(references, predictions),
            "rmse": root_mean_squared_error(references, predictions),
        },
        abs=1e-9,
    )


WORDS = st.lists(st.sampled_from(["the", "cat", "dogs", "bark", "at", "night"]), max_size=8).map(" ".join)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_generation_is_that_of_sacrebleu_in_every_resample(pairs: list[tuple[str, str]], seed: int) -> None:
    answers, references = (list(column) for column in zip(*pairs, strict=True))
    overlap = Overlap(references)
    rows = [{**row, **overlap.of_example(row["prediction"], row["reference"])} for row in rows_of(references, answers)]
    found = scores("generation", rows)
    counts = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)))
    for metric, oracle in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
        assert found[metric] == pytest.approx(oracle(answers, [references]).score / 100, abs=1e-12)
        ours, theirs = ([texts[i] for i in resampled(counts)] for texts in (answers, references))
        resample = statistic(metric, rows)(counts[None].astype(float))[0]
        assert resample == pytest.approx(oracle(ours, [theirs]).score / 100, abs=1e-12)
    for row in rows:
        # sacrebleu recommends effective order for single sentences.
        bleu = sacrebleu.sentence_bleu(row["prediction"], [row["reference"]], use_effective_order=True)
        assert row["bleu"] == pytest.approx(bleu.score / 100, abs=1e-12)
        chrf = sacrebleu.sentence_chrf(row["prediction"], [row["reference"]])
        assert row["chrf"] == pytest.approx(chrf.score / 100, abs=1e-12)


ANSWERS = [
    ["the cat sat on the mat today", "a dog barks", "", "it rains in Tokyo again and again", "yes"],
    ["今天的天气非常好", "他写了三行代码", "", "我们去公园散步", "不"],
]
REFERENCES = [
    ["the cat sat on the red mat today", "the dog barks", "no", "it rains in Tokyo again", "yes"],
    ["今天天气非常好", "他写了3行代码", "是", "我们一起去公园散步吧", "不"],
]


@pytest.mark.parametrize("language", [0, 1])
def test_bleu_and_chrf_are_those_of_sacrebleu_in_every_resample(language: int) -> None:
    """Held against the library on the resampled sentences themselves."""
    answers, references = ANSWERS[language], REFERENCES[language]
    overlap = Overlap(references)
    rows = [overlap.of_example(*pair) for pair in zip(answers, references, strict=True)]
    counts = np.array(
        [[1, 1, 1, 1, 1], [0, 2, 1, 0, 2], [3, 0, 0, 2, 0], [0, 0, 5, 0, 0], [0, 0, 0, 0, 5], [1, 0, 1, 2, 1]]
    )
    of_bleu, of_chrf = (statistic(metric, rows)(counts.astype(float)) for metric in ("bleu", "chrf"))
    for number, row in enumerate(counts):
        ours, theirs = ([texts[i] for i in resampled(row)] for texts in (answers, references))
        tokenize = ["13a", "zh"][language]
        assert of_bleu[number] == pytest.approx(sacrebleu.corpus_bleu(ours, [theirs], tokenize=tokenize).score / 100)
        assert of_chrf[number] == pytest.approx(sacrebleu.corpus_chrf(ours, [theirs]).score / 100)
    assert 0 < of_bleu[0] < 1
    assert of_bleu[3] == of_chrf[3] == 0


VALUES = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.1, 0.3, 2.5, -7.0, 100.0]), st.integers(-8000, 8000).map(lambda number: number / 8)
    ),
    min_size=2,
    max_size=15,
)


@given(pairs=VALUES, seed=st.integers(0, 2**32 - 1))
def test_correlations_are_those_of_scipy(pairs: list[tuple[float, float]], seed: int) -> None:
    """Pearson in every resample; Spearman over the whole split."""
    truth, guess = np.array(pairs).T
    size = len(truth)
    counts = np.stack([np.ones(size), np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size))])
    for found, row in zip(pearson(truth, guess)(counts.astype(float)), counts, strict=True):
        ours, theirs = truth[resampled(row)], guess[resampled(row)]
        if np.ptp(ours) and np.ptp(theirs):
            with warnings.catch_warnings():
                warnings.simplefilter("error", DegenerateDataWarning)
                try:
                    assert found == pytest.approx(pearsonr(ours, theirs).statistic, abs=1e-6)
                except DegenerateDataWarning:
                    assert abs(found) <= 1
        else:
            assert found == 0.0
    if np.ptp(truth) and np.ptp(guess):
        value = spearman(truth, guess)(np.ones((1, size)))[0]
        assert value == pytest.approx(spearmanr(truth, guess).statistic, abs=1e-9)
