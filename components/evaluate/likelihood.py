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
from ..shared.model.packing import Batch, Segment, collate, pack_narrow
from ..shared.model.precision import autocast
from ..shared.running.context import ProgressCounter
from .sampling import TextSample
from .windows import mask, window_at

LOGITS_AT_ONCE = 1 << 26  # maximum N·V logits in memory


def document_segments(documents: Documents, sample: TextSample, max_length: int, first_key: int = 0) -> list[Segment]:
    """Returns the windows of a sample. The key of a segment is the index of its unit in the sample plus `first_key`."""
    segments = []
    for key, (index, number) in enumerate(zip(sample.document.tolist(), sample.window.tolist(), strict=True)):
        start, end, scored_from = _place(documents, index, number, max_length, 1)
        if scored_from >= end:
            continue
        first = int(documents.offsets[index])
        learned = documents.supervised(first + start, first + end)
        if learned is not None:
            learned = learned[learned >= scored_from - start]
        piece = np.asarray(documents.tokens(index)[start:end])
        segments.append(Segment(piece, scored_from - start, key=first_key + key, supervised=learned))
    return segments


def masked_segments(
    documents: Documents,
    sample: TextSample,
    max_length: int,
    passes: int,
    mask_id: int,
    special_ids: Collection[int],
    first_key: int = 0,
) -> list[Segment]:
    """Returns the passes of a sample, each with its tokens masked. Special tokens are not masked or scored.

    The mask token replaces all predicted tokens. (Training leaves some unchanged and replaces others with random tokens.)
    """
    segments = []
    special = np.asarray(sorted(special_ids))
    units = zip(sample.document.tolist(), sample.window.tolist(), sample.turn.tolist(), strict=True)
    for key, (index, number, turn) in enumerate(units):
        start, end, scored_from = _place(documents, index, number, max_length, 0)
        piece = np.array(documents.tokens(index)[start:end])
        first = scored_from - start
        ordinary = first + np.flatnonzero(~np.isin(piece[first:], special))
        chosen = mask(ordinary, passes, index, start, turn)
        if len(chosen):
            originals, piece[chosen] = piece[chosen], mask_id
            segments.append(Segment(piece, len(piece), key=first_key + key, masked=chosen, originals=originals))
    return segments


def _place(documents: Documents, index: int, number: int, max_length: int, scored_from: int) -> tuple[int, int, int]:
    length = documents.offsets[index + 1] - documents.offsets[index]
    start, end, first = window_at(np.array(length), np.array(number), max_length, scored_from)
    return int(start), int(end), int(first)


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
    """Packs segments into batches of at most about `batch_size` · `max_length` tokens, each of segments of similar length.

    As in training, the rows of a batch are as narrow as possible, since attention costs more in wider rows. A row holds at most
    `max_length` tokens, or the longest segment if that is longer.
    """
    order = sorted(range(len(segments)), key=lambda i: (-len(segments[i].tokens), i))
    ends = np.cumsum([len(segments[i].tokens) for i in order])
    parts = np.split(order, np.flatnonzero(np.diff(ends // (batch_size * max_length))) + 1)
    made = []
    for part in parts:
        lengths = [len(segments[i].tokens) for i in part]
        rows = pack_narrow(lengths, max([max_length, *lengths]))
        if rows:
            made.append([[segments[part[i]] for i in row] for row in rows])
    return made


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
    for batch, hidden in forward(model, work, pad_id, progress):
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
    for batch, hidden in forward(model, work, pad_id, progress):
        with autocast(model.device, model.precision):
            logits_M = model.task_logits(hidden, batch)
        lengths_M = (batch.last_at - batch.first_at + 1).tolist()
        for key, length, logits in zip(
            batch.label_key.tolist(), lengths_M, logits_M.float().cpu().numpy(), strict=True
        ):
            found[key] = logits[:length] if logits.ndim == 2 else logits
    return found


def forward(
    model: MixedModel, work: Sequence[list[list[Segment]]], pad_id: int, progress: ProgressCounter
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Yields each batch with its (B·L, H) hidden states. Runs in the inference mode of the consumer."""
    for rows in work:
        batch = collate(rows, pad_id, label_all=True).to(model.device)
        with autocast(model.device, model.precision):
            hidden = model.hidden(batch)
        yield batch, hidden
        progress.advance(tokens=batch.num_tokens)
