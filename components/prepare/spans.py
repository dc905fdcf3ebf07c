"""Windows over contexts in which questions are answered, and where the answers stand in their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .tokenization import BATCH, Encoder

if TYPE_CHECKING:
    from transformers import BatchEncoding


@dataclass(frozen=True)
class Question:
    """What is asked of a context.

    Attributes:
        answer: from and to, in characters of the context; None if there is no answer in it.
    """

    question: str
    context: str
    answer: tuple[int, int] | None = None


@dataclass(frozen=True)
class Window:
    """A question with a piece of its context.

    Attributes:
        tokens: token ids, the tokenizer's own special tokens included.
        context_from: the first token of the context.
        offsets: from and to, in characters of the context, of each of its tokens.
        second_from: the first token of token type 1; -1 where there is none.
        answer: first and last token of the answer; None if it is not in here from end to end.
    """

    tokens: list[int]
    context_from: int
    offsets: list[tuple[int, int]]
    second_from: int
    answer: tuple[int, int] | None


def windows(encoder: Encoder, questions: Sequence[Question], what: str) -> Iterator[list[Window]]:
    """The windows of each question in the order of its context; none where the question leaves the context no room.

    The tokenizer is called as in the question-answering example of transformers (run_qa.py): the context alone is cut, into
    windows of `max_length` tokens that overlap by a quarter of that.

    Args:
        encoder: tokenizer, lengths and progress.
        questions: what to encode.
        what: what the questions are, for the progress.
    """
    with encoder.context.progress(len(questions), "questions", f"tokenizing {what}") as progress:
        for start in range(0, len(questions), BATCH):
            batch = questions[start : start + BATCH]
            found = _windows(encoder, batch)
            yield from found
            progress.advance(len(batch), tokens=sum(len(window.tokens) for inside in found for window in inside))


def _windows(encoder: Encoder, questions: Sequence[Question]) -> list[list[Window]]:
    tokenizer, max_length = encoder.tokenizer, encoder.max_length
    stride = max_length // 4
    asked, contexts = [one.question for one in questions], [one.context for one in questions]
    whole = tokenizer(asked, contexts, return_offsets_mapping=True, verbose=False)
    offsets = [_second(whole, index)[1] for index in range(len(questions))]
    # Tokens of the answer; a window that holds as many holds it from end to end.
    wanted = [len(_touching(inside, one.answer)) for inside, one in zip(offsets, questions, strict=True)]
    found: list[list[Window]] = [[] for _ in questions]
    long = []
    for index, ids in enumerate(whole["input_ids"]):
        if len(ids) <= max_length:
            found[index].append(_window(encoder, whole, index, questions[index], wanted[index]))
        elif max_length - (len(ids) - len(offsets[index])) > stride:
            long.append(index)
        # Else a window would be all overlap, which the tokenizer answers with a crash.
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
    # A tokenizer that truncates at the left gives the last window first.
    return [sorted(inside, key=lambda window: window.offsets[:1]) for inside in found]


def _window(encoder: Encoder, encoded: BatchEncoding, index: int, question: Question, wanted: int) -> Window:
    tokens = list(encoded["input_ids"][index]) or [encoder.bos]
    first, offsets = _second(encoded, index)
    touching = _touching(offsets, question.answer)
    is_whole = bool(touching) and len(touching) == wanted
    types = encoded["token_type_ids"][index] if "token_type_ids" in encoded else []
    return Window(
        tokens=tokens,
        context_from=first if offsets else len(tokens),
        offsets=offsets,
        second_from=types.index(1) if 1 in types else -1,
        answer=(first + touching[0], first + touching[-1]) if is_whole else None,
    )


def _second(encoded: BatchEncoding, index: int) -> tuple[int, list[tuple[int, int]]]:
    """The first token of the second text, and from and to of its tokens, in characters."""
    sequences = encoded.sequence_ids(index)
    offsets = [tuple(pair) for pair, text in zip(encoded["offset_mapping"][index], sequences, strict=True) if text == 1]
    return (sequences.index(1) if offsets else 0), offsets


def _touching(offsets: Sequence[tuple[int, int]], span: tuple[int, int] | None) -> list[int]:
    """The tokens that hold any character of the span."""
    if span is None:
        return []
    return [index for index, (low, high) in enumerate(offsets) if low < span[1] and high > span[0] and low < high]
