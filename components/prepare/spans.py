"""Windows over the contexts of questions, and the token positions of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .tokenization import BATCH, Encoder

if TYPE_CHECKING:
    from transformers import BatchEncoding


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
class QuestionWindow:
    """A question with a part of its context.

    Attributes:
        tokens: token ids, the tokenizer's own special tokens included.
        context_from: index of the first context token.
        offsets: start and end of each context token, in characters of the context.
        second_from: index of the first token of token type 1; -1 if there is none.
        answer: first and last token of the answer; None if the window does not contain the whole answer.
    """

    tokens: list[int]
    context_from: int
    offsets: list[tuple[int, int]]
    second_from: int
    answer: tuple[int, int] | None


def windows(encoder: Encoder, questions: Sequence[Question], what: str) -> Iterator[list[QuestionWindow]]:
    """Yields the windows of each question, in the order of its context; none if the question leaves no space for the context.

    Calls the tokenizer as the question-answering example of transformers does (run_qa.py): only the context is split, into
    windows of `max_length` tokens that overlap by a quarter.

    Args:
        encoder: tokenizer, lengths and progress.
        questions: questions to encode.
        what: name of the questions in progress lines.
    """
    with encoder.context.progress(len(questions), "questions", f"tokenizing {what}") as progress:
        for start in range(0, len(questions), BATCH):
            batch = questions[start : start + BATCH]
            found = _windows(encoder, batch)
            yield from found
            progress.advance(len(batch), tokens=sum(len(window.tokens) for inside in found for window in inside))


def _windows(encoder: Encoder, questions: Sequence[Question]) -> list[list[QuestionWindow]]:
    tokenizer, max_length = encoder.tokenizer, encoder.max_length
    stride = max_length // 4
    asked, contexts = [one.question for one in questions], [one.context for one in questions]
    whole = tokenizer(asked, contexts, return_offsets_mapping=True, verbose=False)
    offsets = [_second(whole, index)[1] for index in range(len(questions))]
    # Number of answer tokens in the whole context. A window with as many contains the whole answer.
    wanted = [len(_touching(inside, one.answer)) for inside, one in zip(offsets, questions, strict=True)]
    found: list[list[QuestionWindow]] = [[] for _ in questions]
    long = []
    for index, ids in enumerate(whole["input_ids"]):
        if len(ids) <= max_length:
            found[index].append(_window(encoder, whole, index, questions[index], wanted[index]))
        elif max_length - (len(ids) - len(offsets[index])) > stride:
            long.append(index)
        # Other questions are skipped: their windows would consist of overlap only, on which the tokenizer crashes.
    if long:
        cut = tokenizer(
            [asked[index] for index in long],
            [contexts[index] for index in long],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        for place, sample in enumerate(cut["overflow_to_sample_mapping"]):
            index = long[sample]
            found[index].append(_window(encoder, cut, place, questions[index], wanted[index]))
    # Tokenizers that truncate on the left return the last window first.
    return [sorted(inside, key=lambda window: window.offsets[:1]) for inside in found]


def _window(encoder: Encoder, encoded: BatchEncoding, index: int, question: Question, wanted: int) -> QuestionWindow:
    tokens = list(encoded["input_ids"][index]) or [encoder.bos]
    first, offsets = _second(encoded, index)
    touching = _touching(offsets, question.answer)
    is_whole = bool(touching) and len(touching) == wanted
    types = encoded["token_type_ids"][index] if "token_type_ids" in encoded else []
    return QuestionWindow(
        tokens=tokens,
        context_from=first if offsets else len(tokens),
        offsets=offsets,
        second_from=types.index(1) if 1 in types else -1,
        answer=(first + touching[0], first + touching[-1]) if is_whole else None,
    )


def _second(encoded: BatchEncoding, index: int) -> tuple[int, list[tuple[int, int]]]:
    """Returns the index of the first token of the second text, and start and end of its tokens, in characters."""
    sequences = encoded.sequence_ids(index)
    offsets = [tuple(pair) for pair, text in zip(encoded["offset_mapping"][index], sequences, strict=True) if text == 1]
    return (sequences.index(1) if offsets else 0), offsets


def _touching(offsets: Sequence[tuple[int, int]], span: tuple[int, int] | None) -> list[int]:
    """Returns the tokens that contain any character of the span."""
    if span is None:
        return []
    return [index for index, (low, high) in enumerate(offsets) if low < span[1] and high > span[0] and low < high]
