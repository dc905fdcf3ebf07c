"""Scores against values worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as confusion_of_sklearn

from mixtune.components.evaluate.scores import (
    Label,
    calibration_error,
    confusion_matrix,
    exact_match,
    example_score,
    token_f1,
)
from mixtune.components.evaluate.scores import split_scores as scores_of_rows
from mixtune.components.evaluate.texts import Overlap
from mixtune.components.shared.config import Task


def split_scores(
    kind: Task, references: Sequence[Label], predictions: Sequence[Label | None]
) -> dict[str, float | None]:
    rows: list[dict[str, Any]] = [
        {"reference": reference, "prediction": prediction}
        for reference, prediction in zip(references, predictions, strict=True)
    ]
    if kind == "generation":
        overlap = Overlap(row["reference"] for row in rows)
        rows = [{**row, **overlap.of_example(row["prediction"], row["reference"])} for row in rows]
    return scores_of_rows(kind, rows)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [("a  cat\n", "a cat", 1.0), ("A cat", "a cat", 0.0), ("", "", 1.0), ("é", "e\u0301", 1.0)],
)
def test_exact_match(prediction: str, reference: str, score: float) -> None:
    assert exact_match(prediction, reference) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("The cat sat.", "the cat", 0.8),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("", "", 1.0),
        ("...", "!", 0.0),
        ("cat cat", "cat", 2 / 3),
        ("我爱猫", "我爱狗", 2 / 3),
        ("東京 tower", "東京", 0.8),
    ],
)
def test_token_f1(prediction: str, reference: str, score: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(score)


def test_macro_f1_of_a_split() -> None:
    references, predictions = list("aabbc"), list("aabcc")
    scores = split_scores("classification", references, predictions)
    assert scores["accuracy"] == pytest.approx(0.8)
    assert scores["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert example_score("classification", "macro_f1", "a", "b") == 0.0


def test_generation_scores_are_means() -> None:
    scores = split_scores("generation", ["a cat", "dog"], ["a cat", "a dog"])
    assert scores["exact_match"] == 0.5
    for metric in ("token_f1", "rouge_1", "rouge_l"):
        assert scores[metric] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("kind", "metric", "prediction", "reference", "score"),
    [
        ("multi_label", "micro_f1", ["a", "b"], ["b", "a"], 1.0),
        ("multi_label", "micro_f1", [], [], 1.0),
        ("multi_label", "micro_f1", ["a"], ["a", "b"], 0.0),
        ("regression", "pearson", 2.5, 3.0, -0.5),
        ("question_answering", "exact_match", "a cat", ["dog", "a  cat"], 1.0),
        ("question_answering", "token_f1", "the cat", ["dog", "the cat sat", "a cat"], 0.8),
        ("question_answering", "token_f1", "我爱猫", ["我爱狗"], 2 / 3),
        ("question_answering", "exact_match", "", [], 1.0),
        ("question_answering", "exact_match", "a cat", [], 0.0),
        ("question_answering", "token_f1", "a cat", [], 0.0),
        ("question_answering", "token_f1", "", ["a cat"], 0.0),
    ],
)
def test_score_of_one_example(kind: Task, metric: str, prediction: Label, reference: Label, score: float) -> None:
    assert example_score(kind, metric, prediction, reference) == pytest.approx(score)


def test_multi_label_scores_by_hand() -> None:
    """`a` once right and once missed, `b` once wrongly given, `c` right; `d` nowhere, so that it has no F1."""
    references: list[Label] = [["a"], ["a", "c"], []]
    scores = split_scores("multi_label", references, [["a"], ["b", "c"], []])
    assert scores == {
        "micro_f1": pytest.approx(2 * 2 / (3 + 3)),
        "macro_f1": pytest.approx((2 / 3 + 0 + 1) / 3),
        "exact_match": pytest.approx(2 / 3),
    }
    assert split_scores("multi_label", [[], []], [[], []]) == {
        "micro_f1": 0.0, "macro_f1": 0.0, "exact_match": 1.0,
    }  # fmt: skip


def test_regression_scores_by_hand() -> None:
    scores = split_scores("regression", [1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 80.0])
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(0.80104, abs=1e-5)
    assert scores["mae"] == pytest.approx((1 + 2 + 3 + 76) / 4)
    assert scores["rmse"] == pytest.approx(((1 + 4 + 9 + 76**2) / 4) ** 0.5)


@pytest.mark.parametrize("predictions", [[0.1, 0.1, 0.1], [1e9, 1e9, 1e9]])
def test_constant_predictions_correlate_with_nothing(predictions: list[Label]) -> None:
    scores = split_scores("regression", [1.0, 2.0, 4.0], predictions)
    assert scores["pearson"] == scores["spearman"] == 0.0
    assert split_scores("regression", [1.0], [2.0])["pearson"] == 0.0


def test_without_all_predictions_there_is_no_score() -> None:
    assert set(split_scores("regression", [1.0, 2.0], [1.0, None]).values()) == {None}
    assert set(split_scores("question_answering", [["a"], []], ["a", None]).values()) == {None}


def test_a_single_label_is_scored_by_where_it_is() -> None:
    scores = split_scores("multi_label", [["a"], [], [], []], [[], [], [], []])
    assert (scores["micro_f1"], scores["macro_f1"]) == (0.0, 0.0)
    scores = split_scores("multi_label", [["a"], ["a"], [], []], [["a"], [], [], []])
    assert scores["micro_f1"] == pytest.approx(2 / 3)


def test_confusion_matrix() -> None:
    """Rows are the truth, in the order of the labels; `d` occurs nowhere, `b` is never given."""
    assert confusion_matrix(list("aabc"), list("acaa"), list("dcba")) == [
        [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 1, 0, 1],
    ]  # fmt: skip
    draw = np.random.default_rng(0)
    truth, given = (draw.choice(list("abc"), 50).tolist() for _ in range(2))
    assert (
        confusion_matrix(truth, given, list("cab")) == confusion_of_sklearn(truth, given, labels=list("cab")).tolist()
    )
    assert np.sum(confusion_matrix(truth, given, list("cabx"))) == 50
    assert confusion_matrix(["a"], ["b"], ["a", "b"]) == [[0, 1], [0, 0]]


def test_calibration_error_by_hand() -> None:
    """Two in the bin up to 14/15 (one right, 0.91 sure on average), one alone at 0.5, one at 1; 0.4 is the end of a bin."""
    assert calibration_error([0.90, 0.92], [True, False]) == pytest.approx(0.41)
    error = calibration_error([0.90, 0.92, 0.5, 1.0], [True, False, False, True])
    assert error == pytest.approx((2 * abs(0.5 - 0.91) + 0.5 + 0.0) / 4)
    assert calibration_error([6 / 15, 6 / 15 + 1e-9], [True, False]) == pytest.approx((0.6 + 0.4) / 2)
    assert calibration_error([1.0], [True]) == 0.0
    assert calibration_error([0.7] * 10, [True] * 7 + [False] * 3) == pytest.approx(0.0)


def test_constant_predictions_and_a_label_that_never_occurs() -> None:
    scores = split_scores("classification", list("aabb"), list("aaaa"))
    assert scores == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 0) / 2)}


def test_chinese_and_empty_answers() -> None:
    scores = split_scores("generation", ["我爱猫", "", "東京"], ["我爱狗", "", ""])
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["token_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
