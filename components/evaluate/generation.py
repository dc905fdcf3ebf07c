"""Greedy answers to prompts, in batches of like length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..shared.context import Progress
from ..shared.model import MixedModel, autocast


@torch.inference_mode()
def generate(
    model: MixedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    batch_size: int,
    progress: Progress,
) -> list[str]:
    """Answers every prompt by the likeliest next token, until EOS or `max_new_tokens`.

    Prompts are padded on the left, so that all of a batch go on at the same place.

    Args:
        prompts: token ids of each.
        progress: counts batches.

    Returns:
        The decoded answers, in the order of the prompts, without special tokens and outer blanks.
    """
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = len(prompts[chosen[0]])
        room = max_new_tokens if positions is None else min(max_new_tokens, positions - width)
        if room > 0:
            ids = np.full((len(chosen), width), tokenizer.pad_token_id, np.int64)
            mask = np.zeros((len(chosen), width), np.int64)
            for row, index in enumerate(chosen):
                ids[row, width - len(prompts[index]) :] = prompts[index]
                mask[row, width - len(prompts[index]) :] = 1
            settings = GenerationConfig(
                max_new_tokens=room,
                do_sample=False,
                num_beams=1,
                eos_token_id=_stops(model, tokenizer),
                pad_token_id=tokenizer.pad_token_id,
            )
            with autocast(model.device, model.precision):
                made = model.generate(
                    input_ids=torch.from_numpy(ids).to(model.device),
                    attention_mask=torch.from_numpy(mask).to(model.device),
                    generation_config=settings,
                )
            for index, text in zip(
                chosen, tokenizer.batch_decode(made[:, width:], skip_special_tokens=True), strict=True
            ):
                answers[index] = text.strip()
        progress.advance(tokens=sum(len(prompts[index]) for index in chosen))
    return answers


def _stops(model: MixedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's EOS and whatever else the model itself stops at."""
    own = model.lm.generation_config.eos_token_id if model.lm.generation_config is not None else None
    listed = own if isinstance(own, list) else [own]
    return sorted({stop for stop in (tokenizer.eos_token_id, *listed) if stop is not None})
