"""Scores against values worked out by hand."""

from __future__ import annotations

import pytest

from mixtune.components.evaluate.scores import exact_match, example_score, split_scores, token_f1


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
    assert example_score("macro_f1", "a", "b") == 0.0


def test_generation_scores_are_means() -> None:
    scores = split_scores("generation", ["a cat", "dog"], ["a cat", "a dog"])
    assert scores == {"exact_match": 0.5, "token_f1": pytest.approx((1 + 2 / 3) / 2)}
