"""Held-out text that stands in training text is found, and nothing else is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.prepare.contamination import WORDS, words
from mixtune.components.prepare.contamination import contaminated as contaminated_examples

LONG = [f"w{number}" for number in range(40)]


def contaminated(held_out: list[str], training: list[str]) -> list[bool]:
    return contaminated_examples([[text] for text in held_out], training)


def test_one_of_several_texts_is_enough() -> None:
    held_out = [["prompt one answer", "prompt one"], ["prompt two answer", "prompt two"]]
    assert contaminated_examples(held_out, ["prompt two other", "prompt two"]) == [False, True]


def test_thirteen_words_in_a_row_are_enough_and_twelve_are_not() -> None:
    held_out = " ".join(LONG)
    thirteen = "before " + " ".join(LONG[5 : 5 + WORDS]) + " after"
    twelve = "before " + " ".join(LONG[5 : 4 + WORDS]) + " after"
    assert contaminated([held_out], [thirteen]) == [True]
    assert contaminated([held_out], [twelve]) == [False]


def test_case_punctuation_and_line_ends_do_not_hide_it() -> None:
    training = "X " + ",\r\n".join(word.upper() for word in LONG[:WORDS])
    assert contaminated([" ".join(LONG)], [training]) == [True]


def test_short_text_counts_where_the_whole_of_it_is_a_training_text() -> None:
    held_out = ["Good movie!", "good film", "!!!", "good"]
    assert contaminated(held_out, ["good   MOVIE", "a good film it is", "!!!"]) == [True, False, True, False]


def test_chinese_characters_are_words() -> None:
    sentence = "今天的天气非常好我们一起去公园散步吧"
    assert len(words(sentence)) == len(sentence)
    assert words("用Python写的3行代码") == ["用", "python", "写", "的", "3", "行", "代", "码"]
    assert contaminated([sentence], [f"他说:{sentence[2:15]}。"]) == [True]
    assert contaminated([sentence], [f"他说:{sentence[2:14]}。"]) == [False]


def test_wide_and_narrow_forms_are_the_same() -> None:
    assert words("ＡＢＣ １２") == ["abc", "12"]


@given(st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=30).map(" ".join), max_size=8), st.data())
def test_agrees_with_the_plain_definition(training: list[str], data: st.DataObject) -> None:
    held_out = data.draw(st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=30).map(" ".join), max_size=8))

    def is_in(text: str, other: str) -> bool:
        own, others = text.split(), other.split()
        if len(own) < WORDS:
            return own == others
        passages = [own[start : start + WORDS] for start in range(len(own) - WORDS + 1)]
        return any(others[start : start + WORDS] in passages for start in range(len(others) - WORDS + 1))

    assert contaminated(held_out, training) == [any(is_in(text, other) for other in training) for text in held_out]
