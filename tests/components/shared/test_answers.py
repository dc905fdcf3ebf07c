"""Answers put together from windows, against every span looked at one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.shared.serving.answers import LONGEST, ContextWindow, answer

WORDS = [f"word{i}" for i in range(110)]
CONTEXT = " ".join(WORDS)
STARTS = np.cumsum([0, *(len(word) + 1 for word in WORDS[:-1])]).tolist()


def window(first: int, count: int, scores: np.ndarray | None = None, before: int = 4, after: int = 1) -> ContextWindow:
    """A window over `count` words of the context, with the question and special tokens before and one token after."""
    logits = np.zeros((before + count + after, 2)) if scores is None else scores
    return ContextWindow(logits, before, [[STARTS[i], STARTS[i] + len(WORDS[i])] for i in range(first, first + count)])


def test_the_span_with_the_highest_sum() -> None:
    one = window(0, 10)
    one.logits[4 + 3, 0], one.logits[4 + 5, 1] = 2.0, 3.0
    one.logits[4 + 9, 0] = 9.0  # nothing ends well after it
    one.logits[4 + 9, 1] = -10.0
    one.logits[4 + 1, 1] = 8.0  # nothing starts well before it
    one.logits[4 : 4 + 2, 0] = -10.0
    found = answer([one], CONTEXT)
    assert (found.text, found.span_score, found.null_score) == ("word3 word4 word5", 5.0, 0.0)


def test_the_question_and_special_tokens_are_no_answer() -> None:
    one = window(5, 6)
    one.logits[[1, 2, 10]] = 50.0
    one.logits[4 + 2] = 1.0
    assert answer([one], CONTEXT).text == "word7"


def test_an_answer_has_a_longest() -> None:
    one = window(0, 100)
    one.logits[4, 0] = one.logits[4 + LONGEST + 1, 1] = 5.0
    one.logits[4 + LONGEST, 1] = 4.0
    assert answer([one], CONTEXT).text == " ".join(WORDS[: LONGEST + 1])


def test_the_best_window_answers_and_the_least_certain_one_says_whether_there_is_an_answer() -> None:
    first, second = window(0, 8), window(5, 8)
    first.logits[4 + 2], second.logits[4 + 6] = 1.0, 3.0
    first.logits[0], second.logits[0] = 10.0, 2.5
    found = answer([first, second], CONTEXT)
    assert (found.text, found.span_score, found.null_score) == ("word11", 6.0, 5.0)
    second.logits[0] = 3.5
    assert answer([first, second], CONTEXT).text == ""


def test_a_window_without_context_only_votes_for_no_answer() -> None:
    empty = window(0, 0)
    empty.logits[0] = -5.0
    assert answer([empty], CONTEXT).text == ""
    assert answer([window(0, 3), empty], CONTEXT).null_score == -10.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_answers_nothing(value: float) -> None:
    one = window(0, 5)
    one.logits[6, 1] = value
    assert answer([window(5, 3), one], CONTEXT).text is None


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    seed=st.integers(0, 2**32 - 1),
    null=st.floats(-6, 6),
)
def test_as_by_looking_at_every_span(sizes: list[int], seed: int, null: float) -> None:
    draw = np.random.default_rng(seed)
    windows, spans = [], []
    for number, size in enumerate(sizes):
        first = 10 * number
        one = window(first, size, draw.normal(size=(4 + size + 1, 2)))
        one.logits[0] = null / 2 + number
        windows.append(one)
        for start in range(size):
            for end in range(start, min(start + LONGEST, size - 1) + 1):
                text = CONTEXT[STARTS[first + start] : STARTS[first + end] + len(WORDS[first + end])]
                spans.append((one.logits[4 + start, 0] + one.logits[4 + end, 1], text))
    score, text = max(spans)
    found = answer(windows, CONTEXT)
    assert found.span_score == pytest.approx(score)
    assert found.null_score == pytest.approx(null)
    assert found.text == ("" if null > score else text)
