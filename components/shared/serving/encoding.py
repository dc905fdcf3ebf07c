"""Token sequences of texts, prompts and questions, as a model is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


def first_and_last(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """Returns the ids of the first and the last token of a text: BOS and EOS, or what the tokenizer has instead."""
    last = _first_known(tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
    return _first_known(tokenizer.bos_token_id, tokenizer.cls_token_id, last), last


def _first_known(*ids: int | None) -> int | None:
    return next((number for number in ids if number is not None), None)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> list[int]:
    """Encodes a text for a task head, truncated to `max_length` by the tokenizer."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if len(ids) > max_length:
        ids = list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
    return ids or _only_first(tokenizer)


@dataclass(frozen=True)
class AddedTokens:
    """The special tokens that a tokenizer adds to a text.

    Attributes:
        before: number of tokens before the text.
        ends: number of EOS or SEP at the end.
        behind: number of tokens behind the text.
    """

    before: int
    ends: int
    behind: int

    @classmethod
    def by(cls, tokenizer: PreTrainedTokenizerBase) -> AddedTokens:
        """Finds out what a tokenizer adds."""
        (alone,), (whole,) = (tokenizer(["a"], add_special_tokens=add)["input_ids"] for add in (False, True))
        spare = len(whole) - len(alone)
        before = next((start for start in range(spare + 1) if whole[start : start + len(alone)] == alone), 0)
        ends = 0
        while ends < spare - before and whole[-1 - ends] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
            ends += 1
        return cls(before, ends, spare - before)


def prompt_parts(
    tokenizer: PreTrainedTokenizerBase, added: AddedTokens, prompt: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Splits a prompt into the special tokens before it and its text. EOS or SEP at its end is removed.

    A prompt without any token begins with the first token of a text.
    """
    first, text = list(prompt[: added.before]), list(prompt[added.before : len(prompt) - added.ends])
    return (first if first or text else _only_first(tokenizer)), text


def _only_first(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    first, _ = first_and_last(tokenizer)
    return [] if first is None else [first]


@dataclass(frozen=True)
class EncodedWindow:
    """A question with a part of its context.

    Attributes:
        tokens: token ids, the tokenizer's own special tokens included.
        context_from: index of the first context token.
        offsets: start and end of each context token, in characters of the context.
        second_from: index of the first token of token type 1; -1 if there is none.
    """

    tokens: list[int]
    context_from: int
    offsets: list[tuple[int, int]]
    second_from: int


@dataclass(frozen=True)
class EncodedContext:
    """A question with its whole context.

    Attributes:
        offsets: start and end of each token of the whole context, in characters.
        windows: windows in the order of the context; none if the question leaves no space for the context.
    """

    offsets: list[tuple[int, int]]
    windows: list[EncodedWindow]


def context_windows(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], contexts: Sequence[str], max_length: int
) -> list[EncodedContext]:
    """Encodes questions with their contexts.

    Calls the tokenizer as the question-answering example of transformers does (run_qa.py): only the context is split, into
    windows of `max_length` tokens that overlap by a quarter.
    """
    stride = max_length // 4
    whole = tokenizer(list(questions), list(contexts), return_offsets_mapping=True, verbose=False)
    found = [EncodedContext(_second(whole, index)[1], []) for index in range(len(questions))]
    long = []
    for index, ids in enumerate(whole["input_ids"]):
        if len(ids) <= max_length:
            found[index].windows.append(_window(tokenizer, whole, index))
        elif max_length - (len(ids) - len(found[index].offsets)) > stride:
            long.append(index)
        # Other questions are skipped: their windows would consist of overlap only, on which the tokenizer crashes.
    if long:
        cut = tokenizer(
            [questions[index] for index in long],
            [contexts[index] for index in long],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        for place, sample in enumerate(cut["overflow_to_sample_mapping"]):
            found[long[sample]].windows.append(_window(tokenizer, cut, place))
    for one in found:  # tokenizers that truncate on the left return the last window first
        one.windows.sort(key=lambda window: window.offsets[:1])
    return found


def _window(tokenizer: PreTrainedTokenizerBase, encoded: BatchEncoding, index: int) -> EncodedWindow:
    tokens = list(encoded["input_ids"][index]) or _only_first(tokenizer)
    first, offsets = _second(encoded, index)
    types = encoded["token_type_ids"][index] if "token_type_ids" in encoded else []
    return EncodedWindow(
        tokens=tokens,
        context_from=first if offsets else len(tokens),
        offsets=offsets,
        second_from=types.index(1) if 1 in types else -1,
    )


def _second(encoded: BatchEncoding, index: int) -> tuple[int, list[tuple[int, int]]]:
    """Returns the index of the first token of the second text, and start and end of its tokens, in characters."""
    sequences = encoded.sequence_ids(index)
    offsets = [
        (int(pair[0]), int(pair[1]))
        for pair, text in zip(encoded["offset_mapping"][index], sequences, strict=True)
        if text == 1
    ]
    return (sequences.index(1) if offsets else 0), offsets
