"""Encodes a rendered chat and its beginnings, each of which must be encoded as if it stood alone, without encoding text twice.

A tokenizer splits a text at its special tokens first and encodes what is between them independently. So the tokens of a
beginning are those of the whole text up to a special token, and then those of the little text that is left behind it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from ..shared.third_party.transformers_chats import encode, has_marks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PieceEncoder:
    """Encodes texts and their beginnings.

    Args:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, ends: Sequence[int]) -> tuple[list[int], list[tuple[int, list[int]]]]:
        """Encodes a text, without BOS and EOS of the tokenizer: the chat template writes them.

        Args:
            text: the text.
            ends: ends of beginnings of it, in characters.

        Returns:
            The tokens of the text; and for each beginning the number of its first tokens that are also those of the text, and
            its further tokens.
        """
        starts = self._starts(text, ends)
        cuts = sorted({0, *starts})
        pieces = [text[low:high] for low, high in pairwise([*cuts, len(text)])]
        rests = [text[start:end] for start, end in zip(starts, ends, strict=True)]
        ids = encode(self._tokenizer, [*pieces, *rests])
        tokens: list[int] = []
        first: dict[int, int] = {}
        for cut, own in zip(cuts, ids, strict=False):
            first[cut] = len(tokens)
            tokens += own
        return tokens, [(first[start], own) for start, own in zip(starts, ids[len(pieces) :], strict=True)]

    def _starts(self, text: str, ends: Sequence[int]) -> list[int]:
        """Returns for each end where the last special token before it starts; 0 if there is none."""
        starts = [0] * len(ends)
        if self._splitting is None or has_marks(text):
            return starts
        pattern, cutting = self._splitting
        places = [found.span() for found in pattern.finditer(text) if found[0] in cutting]
        for number, end in enumerate(ends):
            starts[number] = max((low for low, high in places if high <= end), default=0)
        return starts

    @cached_property
    def _splitting(self) -> tuple[re.Pattern[str], frozenset[str]] | None:
        """The tokens at which the tokenizer splits a text first, and those that do not depend on what is before them."""
        added = [token for token in self._tokenizer.added_tokens_decoder.values() if not token.normalized]
        is_plain = self._tokenizer.is_fast and not self._tokenizer.split_special_tokens
        if not is_plain or not added or any(token.single_word for token in added):
            return None
        longest_first = sorted((token.content for token in added), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))), frozenset(t.content for t in added if not t.lstrip)
