"""Predictions from a model's outputs: labels from logits, text from tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .chats import end_of_turn
from .encoding import first_and_last

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def predicted_label(labels: Sequence[str], logits: np.ndarray) -> tuple[str, list[float]]:
    """Returns the most likely label and the probability of each, from (C,) logits in float64."""
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    return labels[int(np.argmax(shares))], _rounded(shares)


def predicted_labels(labels: Sequence[str], logits: np.ndarray) -> tuple[list[str], list[float]]:
    """Returns the labels with a probability above one half and the probability of each, from (C,) logits in float64."""
    shares = np.exp(-np.logaddexp(0, -logits))  # logistic function without overflow
    return [label for label, share in zip(labels, shares, strict=True) if share > 0.5], _rounded(shares)


def _rounded(shares: np.ndarray) -> list[float]:
    return [round(float(share), 6) for share in shares]


def stop_ids(own: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the last token of a text (the tokenizer's EOS, if it has one), that of a turn in a chat, and the model's own stop
    tokens.

    Args:
        own: the model's generation settings.
    """
    stops = own.eos_token_id if own is not None else None
    listed = stops if isinstance(stops, list) else [stops]
    return sorted(
        {stop for stop in (first_and_last(tokenizer)[1], end_of_turn(tokenizer), *listed) if stop is not None}
    )


def greedy(room: int, stops: Sequence[int], pad_id: int | None) -> GenerationConfig:
    """Returns settings for greedy answers of at most `room` tokens."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=room, do_sample=False, num_beams=1, eos_token_id=list(stops) or None, pad_token_id=pad_id
    )


def plain_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stops: Sequence[int]) -> str:
    """Decodes an answer or a reference up to the first stop token, stripped.

    BOS, EOS, padding, CLS and SEP are left out. Other special tokens are part of the text: a task can have them in its answers.
    """
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    ends = {
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.cls_token_id,
        tokenizer.sep_token_id,
    }  # fmt: skip
    kept = [int(token) for token in tokens[:end] if token not in ends]
    return str(tokenizer.decode(kept, skip_special_tokens=False)).strip()
