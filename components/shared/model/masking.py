"""Dynamic masking for masked LMs (BERT, arXiv:1810.04805), drawn anew at each pass (RoBERTa, arXiv:1907.11692)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RefusedError
from .packing import Segment
from .refusals import NO_MASK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Masking:
    """Selects the tokens of a text to predict.

    Attributes:
        mask_id: token id of the mask.
        special_ids: token ids that are never selected.
        vocabulary_size: random tokens are drawn from the ids below this number.
        probability: fraction of a segment's ordinary tokens that is selected; at least one token is.
        masked: fraction of the selected tokens that becomes the mask.
        random: fraction of the selected tokens that becomes a random token. The rest stay unchanged.
    """

    mask_id: int
    special_ids: tuple[int, ...]
    vocabulary_size: int
    probability: float
    masked: float = 0.8
    random: float = 0.1

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, probability: float) -> Masking:
        """Creates the masking with a tokenizer's mask token.

        Raises:
            RefusedError: if the tokenizer has none.
        """
        if tokenizer.mask_token_id is None:
            raise RefusedError(NO_MASK)
        return cls(int(tokenizer.mask_token_id), special_ids(tokenizer), len(tokenizer), probability)

    def for_measuring(self) -> Masking:
        """Returns a masking under which every selected token becomes the mask, as in `evaluate`.

        What a model forgets about tokens that it sees is another quantity.
        """
        return replace(self, masked=1.0, random=0.0)

    def __call__(self, segment: Segment, draw: np.random.Generator) -> Segment | None:
        """Returns the segment with masked tokens; None if it contains nothing to predict."""
        tokens = np.array(segment.tokens)
        ordinary = np.flatnonzero(~np.isin(tokens, self.special_ids))
        if not len(ordinary):
            return None
        count = max(1, round(self.probability * len(ordinary)))
        chosen = np.sort(draw.choice(ordinary, count, replace=False))
        originals = tokens[chosen]
        fate = draw.random(count)
        tokens[chosen[fate < self.masked]] = self.mask_id
        by_chance = chosen[(fate >= self.masked) & (fate < self.masked + self.random)]
        tokens[by_chance] = self._random_token_ids(draw, len(by_chance))
        return replace(segment, tokens=tokens, masked=chosen, originals=originals)

    def _random_token_ids(self, draw: np.random.Generator, count: int) -> np.ndarray:
        """Draws random ordinary tokens. RoBERTa, for example, would treat a random padding token as the end of the text."""
        special = sorted(number for number in self.special_ids if number < self.vocabulary_size)
        token_ids = draw.integers(0, self.vocabulary_size - len(special), count)
        for number in special:  # skip each special id, from the lowest on
            token_ids += token_ids >= number
        return token_ids


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the token ids that are never predicted. The unknown token represents text and is not among them."""
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    spare = tokenizer.unk_token_id if tokenizer.unk_token_id not in (*ends, tokenizer.pad_token_id) else None
    return tuple(number for number in tokenizer.all_special_ids if number != spare)
