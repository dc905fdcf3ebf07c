"""Windows over the contexts of questions, and the token positions of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..shared.serving.encoding import EncodedWindow, context_windows
from .tokenization import BATCH, Encoder


@dataclass(frozen=True)
class Question:
    """A question on a context.

    Attributes:
        answer: start and end, in characters of the context; None if the context contains no answer.
    """

    question: str
    context: str
    answer: tuple[int, int] | None = None


@dataclass(frozen=True)
class QuestionWindow(EncodedWindow):
    """A window with the answer to its question.

    Attributes:
        answer: first and last token of the answer; None if the window does not contain the whole answer.
    """

    answer: tuple[int, int] | None


def windows(encoder: Encoder, questions: Sequence[Question]) -> Iterator[list[QuestionWindow]]:
    """Yields the windows of each question, in the order of its context; none if the question leaves no space for the context.

    Args:
        encoder: tokenizer and lengths.
        questions: questions to encode.
    """
    for start in range(0, len(questions), BATCH):
        yield from _windows(encoder, questions[start : start + BATCH])


def _windows(encoder: Encoder, questions: Sequence[Question]) -> list[list[QuestionWindow]]:
    asked, contexts = [one.question for one in questions], [one.context for one in questions]
    encoded = context_windows(encoder.tokenizer, asked, contexts, encoder.max_length)
    found = []
    for question, whole in zip(questions, encoded, strict=True):
        # Number of answer tokens in the whole context. A window with as many contains the whole answer.
        wanted = len(_touching(whole.offsets, question.answer))
        found.append([_with_answer(window, question, wanted) for window in whole.windows])
    return found


def _with_answer(window: EncodedWindow, question: Question, wanted: int) -> QuestionWindow:
    touching = _touching(window.offsets, question.answer)
    first, is_whole = window.context_from, bool(touching) and len(touching) == wanted
    return QuestionWindow(**vars(window), answer=(first + touching[0], first + touching[-1]) if is_whole else None)


def _touching(offsets: Sequence[tuple[int, int]], span: tuple[int, int] | None) -> list[int]:
    """Returns the tokens that contain any character of the span."""
    if span is None:
        return []
    return [index for index, (low, high) in enumerate(offsets) if low < span[1] and high > span[0] and low < high]
