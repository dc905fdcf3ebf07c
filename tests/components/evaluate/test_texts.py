"""ROUGE, BLEU and chrF are what rouge-score and sacrebleu say when asked directly, in every script."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from mixtune.components.evaluate.scores import split_scores
from mixtune.components.evaluate.texts import ROUGE, Overlap, RougeWords, bleu_tokenizer

ENGLISH = (
    ["The cat sat on the mat, it didn't move.", "a dog barks loudly at the moon", "yes", ""],
    ["The cat sat on the mat and it didn't move.", "the dog barks at the full moon", "no", "an answer"],
)
CHINESE = (
    ["今天的天气非常好,我们去公园散步。", "他写了3行Python代码", "不"],
    ["今天天气很好,我们去公园吧。", "他写了3行Go代码", "是"],
)
JAPANESE = (
    ["東京は今日も雨です。", "コーヒーを飲みました", "はい"],
    ["東京は明日も雨です。", "コーヒーを飲みたい", "いいえ"],
)


def rows_of(overlap: Overlap, answers: list[str], references: list[str]) -> list[dict[str, Any]]:
    return [
        {"reference": reference, "prediction": answer, **overlap.of_example(answer, reference)}
        for answer, reference in zip(answers, references, strict=True)
    ]


@pytest.mark.parametrize(
    ("pairs", "tokenizer"), [(ENGLISH, "13a"), (CHINESE, "zh"), (JAPANESE, "char")], ids=["en", "zh", "ja"]
)
def test_a_split_is_scored_as_the_libraries_do(pairs: tuple[list[str], list[str]], tokenizer: str) -> None:
    answers, references = pairs
    overlap = Overlap(references)
    found = split_scores("generation", rows_of(overlap, answers, references))
    bleu = sacrebleu.corpus_bleu(answers, [references], tokenize=tokenizer)
    assert found["bleu"] == pytest.approx(bleu.score / 100, abs=1e-12)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score / 100, abs=1e-12)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=RougeWords())
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        each = [scorer.score(truth, answer)[theirs].fmeasure for answer, truth in zip(answers, references, strict=True)]
        assert found[ours] == pytest.approx(sum(each) / len(each))
    assert all(0 < (found[name] or 0) < 1 for name in (*ROUGE, "bleu", "chrf"))
    assert f"tok:{tokenizer}|" in overlap.signatures()["bleu"]


TEXTS = st.lists(
    st.sampled_from(["The", "cat's", "snake_case", "3.5", "the", "CAT", "runs", "-", "!", "_", "\n"]), max_size=12
).map(" ".join)


@given(TEXTS, TEXTS)
def test_rouge_of_ascii_text_is_that_of_its_own_tokenizer(answer: str, reference: str) -> None:
    found = Overlap([reference]).of_example(answer, reference)
    plain = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, answer)
    assert [found["rouge_1"], found["rouge_2"], found["rouge_l"]] == [
        plain[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")
    ]


def test_characters_of_scripts_without_spaces_are_words() -> None:
    """Seven of eight characters are right, the two wrong pairs of seven are those around the wrong one."""
    found = Overlap(["東京は明日も雨"]).of_example("東京は今日も雨", "東京は明日も雨")
    assert found["rouge_1"] == found["rouge_l"] == pytest.approx(6 / 7)
    assert found["rouge_2"] == pytest.approx(4 / 6)
    assert RougeWords().tokenize("用Python写的 Café") == ["用", "python", "写", "的", "café"]


@pytest.mark.parametrize(
    ("references", "tokenizer"),
    [
        (["plain words"], "13a"),
        (["русский текст", "한국어 문장"], "13a"),
        (["", "12 + 3 = 15"], "13a"),
        ([], "13a"),
        (["An English text that names 北京 once"], "13a"),
        (["用Python写的3行代码,很容易读懂"], "zh"),
        (["龍𠀀"], "zh"),
        (["会議は東京で行われた", "重要事項"], "char"),
        (["カタカナ"], "char"),
    ],
)
def test_bleus_tokenizer_follows_from_the_script(references: list[str], tokenizer: str) -> None:
    assert bleu_tokenizer(references) == tokenizer


def test_empty_answers_and_references_score_zero() -> None:
    overlap = Overlap(["", "a b c d e"])
    for answer, reference in (("", ""), ("", "a b c d e"), ("a b c d e", "")):
        row = overlap.of_example(answer, reference)
        found = split_scores("generation", [{"reference": reference, "prediction": answer, **row}])
        assert {found[name] for name in (*ROUGE, "bleu", "chrf")} == {0.0}
        assert row["bleu"] == row["chrf"] == 0.0
    same = rows_of(overlap, ["a b c d e", ""], ["a b c d e", ""])
    assert [split_scores("generation", same)[name] for name in ("bleu", "chrf")] == pytest.approx([1.0, 1.0])


def test_one_example_alone() -> None:
    """A short right answer: sacrebleu's BLEU of a split without four words in a row is 0, that of a sentence is not."""
    overlap = Overlap(["two words"])
    (row,) = rows_of(overlap, ["two words"], ["two words"])
    assert [row[name] for name in ("bleu", "chrf", "rouge_l")] == pytest.approx([1.0, 1.0, 1.0])
    assert split_scores("generation", [row])["bleu"] == 0.0
    assert split_scores("generation", [row])["bleu"] == sacrebleu.corpus_bleu(["two words"], [["two words"]]).score


def test_the_signature_names_versions_and_settings() -> None:
    assert Overlap(["一个句子"]).signatures() == {
        "rouge": "stemmer:no|tok:letters and digits, unspaced scripts by character|version:0.1.2",
        "bleu": "nrefs:1|case:mixed|eff:no|tok:zh|smooth:exp|version:2.6.0",
        "chrf": "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0",
    }


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("no network is needed")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for answers, references in (ENGLISH, CHINESE, JAPANESE):
        overlap = Overlap(references)
        assert split_scores("generation", rows_of(overlap, answers, references))["rouge_l"]
        overlap.signatures()
