"""The bundled questions: a model that knows the answers gets them right, and all candidates are asked the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mixtune.components.evaluate.capabilities import CHOICES, QUESTIONS, ChoiceQuestion, Suite, chat_renderer, questions
from mixtune.components.shared.artifacts import read_jsonl
from mixtune.components.shared.measures import HARNESS_FILE, Measure
from mixtune.components.shared.model.packing import Segment

from ..shared.tiny import tiny_tokenizer
from .made import LABELS, evaluate, write_labelled, write_model

NAMES = [f"{one}{two}" for one in ("alpha", "beta", "gamma", "delta", "rho", "sigma") for two in "abcdefgh"]
TEXTS = [
    f"The capital city of the distant and quiet country number {n} has the name {name}. More."
    for n, name in enumerate(NAMES)
]


def asked() -> list[ChoiceQuestion]:
    return questions(TEXTS, lambda text: f"<user>{text}<assistant>")


def test_every_task_has_questions_with_one_right_choice() -> None:
    found = asked()
    assert Counter(one.task for one in found) == {
        "copying": QUESTIONS, "arithmetic": QUESTIONS, "cloze": len(NAMES), "instructions": QUESTIONS,
    }  # fmt: skip
    assert all(len(set(one.choices)) == CHOICES for one in found)
    assert found == asked(), "the same questions for all candidates"


def test_the_first_choice_is_right() -> None:
    for one in asked():
        right = one.choices[0].strip(" .")
        if one.task == "arithmetic":
            left, sign, other = one.context.rpartition(". ")[2].removesuffix(" =").split()
            assert int(right) == int(left) + int(other) * (1 if sign == "+" else -1) >= 0
        elif one.task == "copying":
            before, _, again = one.context.partition(". ")
            assert before == f"{again} {right}"
        elif one.task == "cloze":
            assert f"{one.context} {right}." in " ".join(TEXTS)
        else:
            assert right.lower() in one.context
            assert one.context.startswith("<user>")


def test_text_without_sentences_and_words_leaves_arithmetic() -> None:
    assert {one.task for one in questions(["一二三", ""], None)} == {"arithmetic"}


def made(losses: list[list[float]]) -> Measure:
    suite = Suite([], ["copying"] * len(losses))
    suite.segments.extend([_segment(number) for number in range(CHOICES * len(losses))])
    (measure,) = suite.measures(np.array(losses).ravel())
    return measure


def _segment(number: int) -> Segment:
    return Segment(np.array([number, number]), key=number)


def test_a_tie_and_a_loss_that_is_not_finite_are_wrong() -> None:
    measure = made([[1, 2, 3, 4], [1, 1, 3, 4], [2, 1, 3, 4], [np.nan, 1, 1, 1], [1, 2, 2, np.inf]])
    assert measure.values == [1, 0, 0, 0, 0]
    assert (measure.value, measure.examples, measure.metric_name) == (0.2, 5, "capabilities.copying.accuracy")


def test_only_what_differs_between_the_choices_is_scored() -> None:
    tokenizer = tiny_tokenizer()
    question = ChoiceQuestion("copying", "w1 w2 w3", (" w4 w5", " w4 w6", " w4 w7", " w4 w8"))
    suite = Suite.of([question], tokenizer, 32)
    lengths = {len(one.tokens) for one in suite.segments}
    shared = suite.segments[0].supervised_from
    assert all((one.tokens[:shared] == suite.segments[0].tokens[:shared]).all() for one in suite.segments)
    assert len({int(one.tokens[shared]) for one in suite.segments}) == CHOICES
    assert len(Suite.of([question], tokenizer, min(lengths) - 1).segments) == 0


def test_without_a_template_there_are_no_instructions() -> None:
    tokenizer = tiny_tokenizer()
    assert chat_renderer(tokenizer) is None
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[answer] {% endif %}"
    )
    render = chat_renderer(tokenizer)
    assert render is not None
    assert render("hello") == "[user] hello [answer] "


@pytest.mark.parametrize("kind", ["pretrained", "finetuned"])
def test_the_step_measures_them(tmp_path: Path, kind: str) -> None:
    model = write_model(tmp_path / "model", kind, kind, LABELS if kind == "finetuned" else None)  # type: ignore[arg-type]
    found, folder = evaluate(tmp_path, model, write_labelled(tmp_path / "labelled"), capabilities=True, max_length=64)
    rows = [Measure.model_validate(row) for row in read_jsonl(folder / kind / HARNESS_FILE)]
    assert [row.task for row in rows] == ["arithmetic"]  # the made text holds neither words nor sentences
    assert found["candidates"][0]["lm_eval"]["capabilities.arithmetic.accuracy"]["value"] == rows[0].value
