"""Trivial answers: the best that a program which read no input could give."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.evaluate.scores import split_scores
from mixtune.components.evaluate.texts import Overlap
from mixtune.components.evaluate.trivial import TrivialAnswer, best_trivial_answer
from mixtune.components.shared.config import Task

LABELS = ("blue", "green", "red")


def best(kind: Task, metric: str, references: list[Any], prompts: list[str] | None = None) -> TrivialAnswer:
    rows = [{"id": str(index), "reference": reference} for index, reference in enumerate(references)]
    by_id = {str(index): prompt for index, prompt in enumerate(prompts or [])}
    return best_trivial_answer(kind, metric, rows, by_id, Overlap(references) if kind == "generation" else None)


@given(st.lists(st.sampled_from(LABELS), min_size=1))
def test_the_most_frequent_label(references: list[str]) -> None:
    found = best("classification", "accuracy", references)
    assert found.name == "the most frequent label"
    assert found.score == max(map(references.count, LABELS)) / len(references)


@given(st.lists(st.lists(st.sampled_from(LABELS), unique=True), min_size=1, max_size=12))
def test_no_constant_prediction_of_labels_is_better(references: list[list[str]]) -> None:
    found = best("multi_label", "micro_f1", references)
    for size in range(len(LABELS) + 1):
        for labels in combinations(LABELS, size):
            rows = [{"reference": reference, "prediction": list(labels)} for reference in references]
            assert (split_scores("multi_label", rows)["micro_f1"] or 0) <= found.score + 1e-12


def test_the_mean_correlates_with_nothing() -> None:
    found = best("regression", "pearson", [1.0, 2.0, 6.0])
    assert (found.name, found.score) == ("the mean", 0.0)
    assert {row["prediction"] for row in found.rows} == {3.0}


def test_answers_to_questions() -> None:
    found = best("question_answering", "exact_match", [["Rome"], [], [], ["Rome", "Roma"], ["Oslo"]])
    assert (found.name, found.score) == ("no answer", 0.4)
    found = best("question_answering", "exact_match", [["Rome"], [], ["Roma", "Rome"], ["Rome"]])
    assert (found.name, found.score) == ("the most frequent answer", 0.75)


@pytest.mark.parametrize("metric", ["exact_match", "token_f1", "rouge_l", "bleu", "chrf"])
def test_generated_texts(metric: str) -> None:
    prompts = [f"{word} is said to be {word}" for word in ("one", "two", "three", "four")]
    assert best("generation", metric, list(prompts), prompts).name == "a copy of the prompt"
    assert (
        best("generation", metric, ["the same words every time"] * 3 + ["others"], prompts).name
        == "the most frequent answer"
    )


def test_an_empty_reference_is_answered_by_an_empty_answer() -> None:
    found = best("generation", "exact_match", ["", "", "a b"], ["x", "y", "z"])
    assert found.name == "an empty answer"
    assert found.score == pytest.approx(2 / 3)
