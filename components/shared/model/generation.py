"""Generates text after prompts, in batches of similar length: greedily or by sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from typing import Any, Protocol

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from ..serving.decoding import greedy, plain_text, stop_ids
from .mixed_model import MixedModel
from .precision import autocast


class Progress(Protocol):
    """Counts what is done."""

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        """Adds `n` completed units, in which `tokens` tokens were processed."""


def generate(
    model: MixedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    batch_size: int,
    progress: Progress,
) -> list[str | None]:
    """Answers each prompt greedily, until EOS, a stop token of the model, or `max_new_tokens`.

    Prompts are padded on the left, so that all answers of a batch start at the same position. Other generation settings of the
    model (repetition penalty, minimum length) are ignored. The answers do not depend on the batches, except for rounding.

    Args:
        prompts: token ids of each prompt.
        progress: counts prompts.

    Returns:
        The answers as `plain_text` decodes them, in the order of the prompts; None if a logit before the end is not finite.
    """
    stops = stop_ids(model.lm.generation_config, tokenizer)
    made = generate_ids(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
    return [None if tokens is None else plain_text(tokenizer, tokens, stops) for tokens in made]


@torch.inference_mode()
def generate_ids(
    model: MixedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    batch_size: int,
    progress: Progress,
    sample: bool = False,
) -> list[list[int] | None]:
    """Returns the token ids that follow each prompt, with the stop token that ended them, if one did.

    Args:
        sample: draw from the model's distribution (temperature 1) with torch's random state, instead of greedily.

    Returns:
        In the order of the prompts; None if a logit before the end is not finite.
    """
    answers: list[list[int] | None] = [[] for _ in prompts]
    stops = stop_ids(model.lm.generation_config, tokenizer)
    for chosen, room in _batches(model, prompts, max_new_tokens, batch_size):
        width = len(prompts[chosen[0]])
        if room > 0:
            ids = np.full((len(chosen), width), tokenizer.pad_token_id, np.int64)
            mask = np.zeros((len(chosen), width), np.int64)
            for row, index in enumerate(chosen):
                ids[row, width - len(prompts[index]) :] = prompts[index]
                mask[row, width - len(prompts[index]) :] = 1
            settings = greedy(room, stops, tokenizer.pad_token_id)
            if sample:
                settings.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
            watch = _NotFinite(width, stops, len(chosen), model.device)
            with autocast(model.device, model.precision), _own_settings_aside(model):
                made = model.generate(
                    input_ids=torch.from_numpy(ids).to(model.device),
                    attention_mask=torch.from_numpy(mask).to(model.device),
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([watch]),
                )
            for index, tokens, broken in zip(chosen, made[:, width:].tolist(), watch.rows_B.tolist(), strict=True):
                end = next((place + 1 for place, token in enumerate(tokens) if token in stops), len(tokens))
                answers[index] = None if broken else tokens[:end]
        progress.advance(len(chosen), tokens=sum(len(prompts[index]) for index in chosen))
    return answers


def _batches(
    model: MixedModel, prompts: Sequence[np.ndarray], max_new_tokens: int, batch_size: int
) -> Iterator[tuple[list[int], int]]:
    """Yields batches of prompts of similar length, the longest first in each, and the number of tokens that each may get.

    Prompts that leave fewer than `max_new_tokens` positions are batched with prompts of the same length only.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def room(index: int) -> int:
        return max_new_tokens if positions is None else min(max_new_tokens, positions - len(prompts[index]))

    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    for tokens, group in groupby(order, key=room):
        while chosen := list(islice(group, batch_size)):
            yield chosen, tokens


class _NotFinite(LogitsProcessor):
    """Records which rows had a logit that is not finite before their answer ended. -inf, which forbids a token, is allowed.

    Args:
        width: tokens in the padded prompts.
        size: B, number of rows.
    """

    def __init__(self, width: int, stops: Sequence[int], size: int, device: torch.device) -> None:
        self._width = width
        self._stops = torch.tensor(stops, dtype=torch.long, device=device)
        self.rows_B = torch.zeros(size, dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Checks the (B, V) next-token logits after (B, length) tokens. Returns the logits unchanged."""
        ended_B = torch.isin(input_ids[:, self._width :], self._stops).any(1)
        self.rows_B |= ~ended_B & ~scores.amax(1).isfinite()
        return scores


@contextmanager
def _own_settings_aside(model: MixedModel) -> Iterator[None]:
    """Temporarily removes the model's own generation settings, from which transformers takes unset values."""
    lm: Any = model.lm
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own
