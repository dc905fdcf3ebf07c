"""Measures how far a candidate's predictions on the task's inputs are from those of the pretrained model.

The measure is KL(pretrained ‖ candidate), a mean over tokens, in nats. It needs no pretraining text, and I. Shenfeld et al.
(RL's Razor: Why Online Reinforcement Learning Forgets Less, arXiv:2509.04259) found that it predicts forgetting. For a causal
language model it compares the distributions of the next token at every token of an input; for a masked one those of the masked
tokens, where every input is read once, with a part of its tokens masked.

Of the pretrained model, only the hidden states at these tokens and the LM head are kept, so that no two models are in memory.
Shapes: N compared tokens of a batch, H hidden size, V vocabulary, E examples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..shared.data.prepared import Documents
from ..shared.model.bf16_on_cpu import fast_bf16
from ..shared.model.device import pick_device
from ..shared.model.loading import load_model
from ..shared.model.masking import special_ids
from ..shared.model.mixed_model import MixedModel
from ..shared.model.packing import Segment
from ..shared.model.precision import autocast, pick_precision
from ..shared.model.tokenizer import load_tokenizer
from ..shared.running.context import Context
from .config import EvaluateStep
from .held_out import HeldOut
from .likelihood import LOGITS_AT_ONCE, batches, forward
from .windows import mask, mask_passes

MOST_TOKENS = 16_384
"""Input tokens that are read, unless `evaluate.max_tokens` is less: the examples of a fixed random order that fit, the same for
all candidates."""
SAMPLE_SEED = 0


class Divergence:
    """KL(pretrained ‖ candidate) on a sample of the dev examples' inputs.

    Args:
        pretrained: folder of the pretrained model, which is read here.
        config: options of the step.
        held_out: the held-out data.
    """

    def __init__(self, pretrained: str, config: EvaluateStep, held_out: HeldOut, context: Context) -> None:
        self._context = context
        tokenizer = load_tokenizer(pretrained)
        model = load_model(pretrained, pick_device()).eval()
        model.precision = config.precision
        documents = Documents(held_out.labelled_folder, "dev")
        masked = model.objective == "masked_lm"
        segments = (
            _masked_inputs(documents, config.mask_probability, int(tokenizer.mask_token_id), special_ids(tokenizer))
            if masked
            else _inputs(documents, held_out.with_head)
        )
        self._segments = _sample(segments, min(MOST_TOKENS, config.max_tokens or MOST_TOKENS))
        self._ids = [record["id"] for record in documents.iter_records()]
        self._work = batches(self._segments, config.max_length, config.batch_size)
        self._pad_id = int(tokenizer.pad_token_id)
        self._hidden: list[Tensor] = []
        with fast_bf16([model.lm], model.device, pick_precision(config.precision), backward=False):
            self._read(model)
        setattr(model.lm, model.lm.base_model_prefix, nn.Module())  # frees all but the LM head
        self._pretrained = model

    @torch.inference_mode()
    def _read(self, model: MixedModel) -> None:
        with self._context.progress(len(self._work), "batches", "pretrained inputs") as progress:
            for batch, hidden in forward(model, self._work, self._pad_id, progress):
                self._hidden.append(hidden[batch.lm_at].cpu())

    @torch.inference_mode()
    def rows(self, model: MixedModel) -> list[dict[str, Any]]:
        """Returns, for each example of the sample, its id, the number of compared tokens, and Σ KL over them, in nats."""
        precision = model.precision
        size = len(self._ids)
        nats_E, tokens_E = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
        chunk = max(1, LOGITS_AT_ONCE // 4 // model.vocabulary_size)
        with (
            fast_bf16([self._pretrained.lm], model.device, pick_precision(precision), backward=False),
            self._context.progress(len(self._work), "batches", "inputs") as progress,
        ):
            batches_read = forward(model, self._work, self._pad_id, progress)
            for (batch, hidden), theirs_NH in zip(batches_read, self._hidden, strict=True):
                for start in range(0, len(batch.lm_at), chunk):
                    part = slice(start, start + chunk)
                    with autocast(model.device, precision):
                        ours_NV = model.lm_logits(hidden[batch.lm_at[part]])
                        theirs_NV = self._pretrained.lm_logits(theirs_NH[part].to(model.device))
                    kl_N = divergence(theirs_NV, ours_NV).cpu()
                    key_N = batch.lm_key[part].cpu()
                    nats_E.index_add_(0, key_N, kl_N)
                    tokens_E.index_add_(0, key_N, torch.ones_like(key_N))
        return [
            {"id": self._ids[key], "tokens": int(tokens_E[key]), "nats": float(nats_E[key])}
            for key in sorted({segment.key for segment in self._segments})
        ]


def divergence(before_NV: Tensor, after_NV: Tensor) -> Tensor:
    """Returns the (N,) KL(before ‖ after) of the distributions with these logits, in nats, float64."""
    before, after = (logits.float().log_softmax(-1) for logits in (before_NV, after_NV))
    return F.kl_div(after, before, reduction="none", log_target=True).sum(-1, dtype=torch.float64)


def mean_divergence(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns Σ nats / Σ tokens of what `Divergence.rows` returned; None if nothing was compared or a value is not finite."""
    nats, tokens = sum(row["nats"] for row in rows), sum(row["tokens"] for row in rows)
    return nats / tokens if tokens and math.isfinite(nats) else None


def _inputs(documents: Documents, with_head: bool) -> list[Segment]:
    """Returns the examples without what is to be predicted. Without a task head, the first token of the answer is the last
    that is predicted."""
    segments = []
    for key in range(len(documents)):
        tokens = np.asarray(documents.tokens(key))
        end = len(tokens) if with_head else int(documents.supervised_from[key]) + 1
        if min(end, len(tokens)) > 1:
            segments.append(Segment(tokens[:end], 1, key=key))
    return segments


def _masked_inputs(
    documents: Documents, mask_probability: float, mask_id: int, special: Collection[int]
) -> list[Segment]:
    """Returns the examples, each with one part of its tokens masked."""
    segments = []
    never = np.asarray(sorted(special))
    for key in range(len(documents)):
        piece = np.array(documents.tokens(key))
        chosen = mask(np.flatnonzero(~np.isin(piece, never)), mask_passes(mask_probability), key, 0, 0)
        if len(chosen):
            originals, piece[chosen] = piece[chosen], mask_id
            segments.append(
                Segment(
                    piece,
                    len(piece),
                    key=key,
                    masked=chosen,
                    originals=originals,
                    second_from=int(documents.second_from[key]),
                )
            )
    return segments


def _sample(segments: Sequence[Segment], max_tokens: int) -> list[Segment]:
    """Returns the segments that are read: as many as have `max_tokens` together, and at least one."""
    order = np.random.default_rng(SAMPLE_SEED).permutation(len(segments)).tolist()
    ends = np.cumsum([len(segments[i].tokens) for i in order])
    count = max(1, int(np.searchsorted(ends, max_tokens, side="right")))
    return [segments[i] for i in sorted(order[:count])]
