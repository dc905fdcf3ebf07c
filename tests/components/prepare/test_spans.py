"""Windows over contexts: as a plain call of the tokenizer gives them, with the answer where it stands."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mixtune.components.prepare.spans import Question, QuestionWindow, windows
from mixtune.components.prepare.tokenization import Encoder, train_tokenizer
from tests.conftest import sentences

from .wordpiece import bert_tokenizer

TEXTS = [*sentences(100), "今天的天气非常好。", "北京是中国的首都。"]


def tokenizers() -> dict[str, Any]:
    return {
        "masked": train_tokenizer(TEXTS, 400, 64, "masked_lm"),
        "causal": train_tokenizer(TEXTS, 400, 64),
        "bert": bert_tokenizer(TEXTS),
    }


MADE = tokenizers()


def made(name: str, questions: list[Question], max_length: int) -> list[list[QuestionWindow]]:
    return list(windows(Encoder(MADE[name], max_length), questions))


def plain(name: str, question: str, context: str, max_length: int) -> Any:
    """What users of transformers call."""
    return MADE[name](
        question,
        context,
        truncation="only_second",
        max_length=max_length,
        stride=max_length // 4,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("max_length", [16, 24, 64])
def test_tokens_are_those_of_a_plain_call(name: str, max_length: int) -> None:
    question, context = "the cat sees", " ".join(sentences(6)) + "。北京是中国的首都"
    (found,) = made(name, [Question(question, context)], max_length)
    expected = plain(name, question, context, max_length)
    assert [window.tokens for window in found] == expected["input_ids"]
    for index, window in enumerate(found):
        second = [place for place, text in enumerate(expected.sequence_ids(index)) if text == 1]
        assert window.context_from == second[0]
        assert window.offsets == [expected["offset_mapping"][index][place] for place in second]
        types = expected.get("token_type_ids", [[]] * len(found))[index]
        assert window.second_from == (types.index(1) if types else -1)
        if types:
            assert types == [int(place >= window.second_from) for place in range(len(types))]
    assert (found[0].offsets[0][0], found[-1].offsets[-1][1]) == (0, len(context))


def test_one_batch_holds_short_and_long_contexts_and_questions_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long, hopeless = (
        Question("the cat", "a dog"),
        Question("a dog", "red house " * 40),
        Question("the cat sees " * 20, "a dog"),
    )
    found = made("masked", [hopeless, long, short, hopeless], 24)
    assert [bool(inside) for inside in found] == [False, True, True, False]
    assert len(found[2]) == 1
    assert found[1] == made("masked", [long], 24)[0]
    monkeypatch.setattr("mixtune.components.prepare.spans.BATCH", 1)
    assert made("masked", [hopeless, long, short, hopeless], 24) == found


@pytest.mark.parametrize("name", MADE)
def test_no_length_of_question_or_context_is_a_crash(name: str) -> None:
    for max_length in (8, 13, 32):
        asked = [Question("a " * q, "a " * c) for q in range(1, 40, 2) for c in (1, 2, 5, 9, 60)]
        for question, inside in zip(asked, made(name, asked, max_length), strict=True):
            size = len(MADE[name](question.question, question.context)["input_ids"])
            assert inside or size > max_length
            assert all(len(window.tokens) <= max_length for window in inside)
            if inside:
                covered = {place for window in inside for low, high in window.offsets for place in range(low, high)}
                assert {place for place, letter in enumerate(question.context) if letter == "a"} <= covered


letters = st.text(st.sampled_from("ab的天气非常 .é\u0301😀"), min_size=1, max_size=80)


@pytest.mark.parametrize("name", MADE)
@given(context=letters, question=letters, span=st.tuples(st.integers(0, 79), st.integers(1, 20)))
def test_offsets_of_the_answers_tokens_give_back_the_answer(
    name: str, context: str, question: str, span: tuple[int, int]
) -> None:
    start, end = span[0], min(sum(span), len(context))
    answer = context[start:end]
    assume(answer and answer == answer.strip())
    (found,) = made(name, [Question(question, context, (start, end))], 32)
    whole = MADE[name](question, context, return_offsets_mapping=True)
    every = [pair for pair, text in zip(whole["offset_mapping"], whole.sequence_ids(), strict=True) if text == 1]
    held = [pair for pair in every if pair[0] < end and pair[1] > start]
    for window in found:
        if window.answer is None:
            # Some of its tokens are missing: it is not in here whole, or the tokenizer sees nothing of it.
            here = [pair for pair in window.offsets if pair[0] < end and pair[1] > start]
            assert len(here) < len(held) or not held
            continue
        first, last = (place - window.context_from for place in window.answer)
        chosen = window.offsets[first : last + 1]
        assert chosen == held
        low, high = chosen[0][0], chosen[-1][1]
        # Up to borders of tokens, and to what the tokenizer drops (WordPiece: an accent, a blank).
        assert answer in context[low:high] or set(context[start:low] + context[high:end]) <= {" ", "\u0301"}
        # No token at either end could be spared.
        assert chosen[0][1] > start
        assert chosen[-1][0] < end
    if held and len(found) == 1:
        assert found[0].answer is not None


def test_chinese_answer_is_found_to_the_character_in_each_window_that_holds_it() -> None:
    context = "北京是中国的首都。" * 6
    start = context.index("中国", 20)
    for name in ("bert", "masked"):
        (found,) = made(name, [Question("首都?", context, (start, start + 2))], 32)
        having = [window for window in found if window.answer]
        assert 1 <= len(having) < len(found)
        for window in having:
            assert window.answer is not None
            first, last = (window.offsets[place - window.context_from] for place in window.answer)
            assert "中国" in context[first[0] : last[1]]
            if name == "bert":
                assert (first[0], last[1]) == (start, start + 2)


def test_context_of_which_the_tokenizer_sees_nothing() -> None:
    (found,) = made("bert", [Question("a", "\u200b", (0, 1))], 16)
    (window,) = found
    assert (window.offsets, window.context_from, window.answer) == ([], len(window.tokens), None)


def test_truncation_at_the_left_gives_windows_in_the_order_of_the_context() -> None:
    context = " ".join(str(number) for number in range(60))
    tokenizer = train_tokenizer(TEXTS, 400, 64, "masked_lm")
    tokenizer.truncation_side = "left"
    (found,) = windows(Encoder(tokenizer, 32), [Question("a", context)])
    starts = [window.offsets[0][0] for window in found]
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert found[-1].offsets[-1][1] == len(context)
