"""Forward passes over packed rows: losses of texts in nats, and what a task head puts out.

The loss of a causal language model is that of each token given those before it. A masked one has no such thing; its loss
is a pseudo-likelihood (J. Salazar et al., arXiv:1910.14659) with fixed masks: every text is read in k passes, in each of
which another k-th of its tokens is replaced by the mask token and predicted.
Shapes: N scored tokens, V vocabulary, K keys, M labelled segments.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..shared.data.prepared import Documents
from ..shared.model.mixed_model import MixedModel
from ..shared.model.packing import Batch, Segment, collate, pack
from ..shared.model.precision import autocast
from ..shared.running.context import Progress
from .windows import masks, windows

LOGITS_AT_ONCE = 1 << 26  # values of N·V logits held in memory at a time


def document_segments(documents: Documents, count: int, max_length: int) -> list[Segment]:
    """Windows over the first `count` documents; a segment's key is its document's index."""
    segments = []
    for index in range(count):
        tokens = documents.tokens(index)
        for window in windows(len(tokens), max_length):
            piece = np.asarray(tokens[window.start : window.end])
            segments.append(Segment(piece, window.scored_from - window.start, key=index))
    return segments


def masked_segments(
    documents: Documents, count: int, max_length: int, passes: int, mask_id: int, special_ids: Collection[int]
) -> list[Segment]:
    """The same windows once for each pass, with that pass's tokens masked; special tokens are neither masked nor scored.

    Always the mask token stands in for what is predicted; training, which also leaves some tokens and draws others, is
    another matter.
    """
    segments = []
    special = np.asarray(sorted(special_ids))
    for index in range(count):
        tokens = documents.tokens(index)
        for window in windows(len(tokens), max_length, scored_from=0):
            piece = np.asarray(tokens[window.start : window.end])
            first = window.scored_from - window.start
            ordinary = first + np.flatnonzero(~np.isin(piece[first:], special))
            for chosen in masks(ordinary, passes, index, window.start):
                seen = piece.copy()
                seen[chosen] = mask_id
                segments.append(Segment(seen, len(seen), key=index, masked=chosen, originals=piece[chosen]))
    return segments


def example_segments(documents: Documents, with_head: bool) -> list[Segment]:
    """Labelled examples, whole (question answering: each window over them); their key is their index.

    Where a head answers no token is scored.
    """
    segments = []
    for index in range(len(documents)):
        tokens = np.asarray(documents.tokens(index))
        supervised_from = len(tokens) if with_head else int(documents.supervised_from[index])
        segments.append(Segment(tokens, supervised_from, key=index, second_from=int(documents.second_from[index])))
    return segments


def batches(segments: Sequence[Segment], max_length: int, batch_size: int) -> list[list[list[Segment]]]:
    """Packs segments into rows and rows into batches.

    A row holds `max_length` tokens, or the longest segment where that is longer.
    """
    lengths = [len(segment.tokens) for segment in segments]
    rows = [[segments[i] for i in row] for row in pack(lengths, max([max_length, *lengths]))]
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def unpacked(segments: Sequence[Segment], keys: Sequence[int], batch_size: int) -> list[list[list[Segment]]]:
    """The segments of some keys, each in a row of its own.

    In a packed row a value that is not finite reaches the segments beside it: attention weighs it by zero, and that is
    not a number.
    """
    chosen = set(keys)
    rows = [[segment] for segment in segments if segment.key in chosen]
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


@torch.inference_mode()
def losses(
    model: MixedModel,
    work: Sequence[list[list[Segment]]],
    num_keys: int,
    pad_id: int,
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the losses and counts of the scored tokens by key.

    Returns:
        (K,) float64, nats; (K,) int64, tokens.
    """
    nats_K = torch.zeros(num_keys, dtype=torch.float64)
    count_K = torch.zeros(num_keys, dtype=torch.int64)
    for batch, hidden in _forward(model, work, pad_id, progress):
        chunk = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
        for start in range(0, len(batch.lm_at), chunk):
            part = slice(start, start + chunk)
            at_N, target_N, key_N = batch.lm_at[part], batch.lm_target[part], batch.lm_key[part].cpu()
            with autocast(model.device, model.precision):
                logits_NV = model.lm_logits(hidden[at_N])
            ce_N = F.cross_entropy(logits_NV.float(), target_N, reduction="none").cpu().double()
            nats_K.index_add_(0, key_N, ce_N)
            count_K.index_add_(0, key_N, torch.ones_like(key_N))
    return nats_K.numpy(), count_K.numpy()


@torch.inference_mode()
def head_logits(
    model: MixedModel, work: Sequence[list[list[Segment]]], pad_id: int, progress: Progress
) -> dict[int, np.ndarray]:
    """What the task head says of each example, by key.

    Returns:
        (C,) logit of each label; (1,) the value, in regression; (length, 2) logits of start and end at each token, in
        question answering.
    """
    found: dict[int, np.ndarray] = {}
    for batch, hidden in _forward(model, work, pad_id, progress):
        with autocast(model.device, model.precision):
            logits_M = model.task_logits(hidden, batch)
        lengths_M = (batch.last_at - batch.first_at + 1).tolist()
        for key, length, logits in zip(
            batch.label_key.tolist(), lengths_M, logits_M.float().cpu().numpy(), strict=True
        ):
            found[key] = logits[:length] if logits.ndim == 2 else logits
    return found


def _forward(
    model: MixedModel, work: Sequence[list[list[Segment]]], pad_id: int, progress: Progress
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Each batch with its (B·L, H) hidden states. Runs in the inference mode of whoever asks for the next one."""
    for rows in work:
        batch = collate(rows, pad_id, label_all=True).to(model.device)
        with autocast(model.device, model.precision):
            hidden = model.hidden(batch)
        yield batch, hidden
        progress.advance(tokens=batch.num_tokens)
