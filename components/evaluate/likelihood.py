"""Forward passes over packed rows: losses of texts in nats, and outputs of a task head.

The loss of a causal language model is that of each token given the tokens before it. For a masked language model the loss is a
pseudo-likelihood (J. Salazar et al., arXiv:1910.14659) with fixed masks: every text is read in k passes, and each pass masks
and predicts another k-th of its tokens.
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
from ..shared.running.context import ProgressCounter
from .windows import masks, windows

LOGITS_AT_ONCE = 1 << 26  # maximum N·V logits in memory


def document_segments(documents: Documents, count: int, max_length: int) -> list[Segment]:
    """Returns the windows over the first `count` documents. A segment's key is the index of its document."""
    segments = []
    for index in range(count):
        tokens = documents.tokens(index)
        for window in windows(len(tokens), max_length):
            piece = np.asarray(tokens[window.start : window.end])
            start = int(documents.offsets[index])
            learned = documents.supervised(start + window.start, start + window.end)
            if learned is not None:
                learned = learned[learned >= window.scored_from - window.start]
            segments.append(Segment(piece, window.scored_from - window.start, key=index, supervised=learned))
    return segments


def masked_segments(
    documents: Documents, count: int, max_length: int, passes: int, mask_id: int, special_ids: Collection[int]
) -> list[Segment]:
    """Returns the same windows once for each pass, with that pass's tokens masked. Special tokens are not masked or scored.

    The mask token replaces all predicted tokens. (Training leaves some unchanged and replaces others with random tokens.)
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
    """Returns the labelled examples (question answering: each window over them). A segment's key is the index of its example.

    With a task head, no tokens are scored.
    """
    segments = []
    for index in range(len(documents)):
        tokens = np.asarray(documents.tokens(index))
        supervised_from = len(tokens) if with_head else int(documents.supervised_from[index])
        learned = None if with_head else documents.supervised(*documents.offsets[index : index + 2].tolist())
        second_from = int(documents.second_from[index])
        segments.append(Segment(tokens, supervised_from, key=index, second_from=second_from, supervised=learned))
    return segments


def batches(segments: Sequence[Segment], max_length: int, batch_size: int) -> list[list[list[Segment]]]:
    """Packs segments into rows and rows into batches.

    A row holds `max_length` tokens, or the longest segment if that is longer.
    """
    lengths = [len(segment.tokens) for segment in segments]
    rows = [[segments[i] for i in row] for row in pack(lengths, max([max_length, *lengths]))]
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def unpacked(segments: Sequence[Segment], keys: Sequence[int], batch_size: int) -> list[list[list[Segment]]]:
    """Returns the segments of the given keys, each in its own row.

    In a packed row, values that are not finite spread to other segments: attention multiplies them by zero, which gives
    NaN.
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
    progress: ProgressCounter,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the sums of the losses and the counts of the scored tokens, by key.

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
    model: MixedModel, work: Sequence[list[list[Segment]]], pad_id: int, progress: ProgressCounter
) -> dict[int, np.ndarray]:
    """Computes the task head's logits for each example, by key.

    Returns:
        (C,) logit of each label; for regression the (1,) value; for question answering (length, 2) logits of start and end at
        each token.
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
    model: MixedModel, work: Sequence[list[list[Segment]]], pad_id: int, progress: ProgressCounter
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Yields each batch with its (B·L, H) hidden states. Runs in the inference mode of the consumer."""
    for rows in work:
        batch = collate(rows, pad_id, label_all=True).to(model.device)
        with autocast(model.device, model.precision):
            hidden = model.hidden(batch)
        yield batch, hidden
        progress.advance(tokens=batch.num_tokens)
