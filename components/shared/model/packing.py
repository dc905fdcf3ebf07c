"""Packed rows: several documents in one row that do not attend to each other.

Position ids restart at every segment. Without an attention mask, transformers derives the segments of a causal model from the
position ids and restricts attention to each segment (block-diagonal under SDPA and eager, variable-length kernels under
FlashAttention); an encoder gets an explicit block-diagonal mask. Shapes: B rows, L tokens in a row, N supervised tokens, M
labelled segments, K numbers of a target, T tokens of the fine-tuning stream, S segments.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

_WIDTHS = 16  # how many row counts are tried for a step


@dataclass(frozen=True)
class Segment:
    """One piece of a row. Attention stays within it.

    Attributes:
        tokens: (length,) token ids, as the model reads them.
        supervised_from: causal LM: index of the first supervised token; at least 1, `len(tokens)` for none.
        label: index of the class; -1 for none.
        key: any identifier that the caller chooses for the segment.
        pretrain: whether it comes from the pretraining stream.
        targets: multi-label, regression and question answering: (K,) numbers.
        second_from: first token of token type 1; -1 for none.
        masked: masked LM: indices of the predicted tokens. No other token is supervised.
        originals: masked LM: the original token ids at these indices.
        supervised: causal LM: indices of the supervised tokens, from 1 on, if they are not those from `supervised_from` on.
        weight: weight of each of its supervised tokens, or of the labelled segment, in the mean loss of its stream.
    """

    tokens: np.ndarray
    supervised_from: int = 1
    label: int = -1
    key: int = 0
    pretrain: bool = False
    targets: tuple[float, ...] = ()
    second_from: int = -1
    masked: np.ndarray | None = None
    originals: np.ndarray | None = None
    supervised: np.ndarray | None = None
    weight: float = 1.0

    @property
    def num_supervised(self) -> int:
        """Returns the number of predicted tokens; for a causal LM after the label shift."""
        if self.masked is not None:
            return len(self.masked)
        if self.supervised is not None:
            return len(self.supervised)
        return len(self.tokens) - max(self.supervised_from, 1)

    @property
    def labelled(self) -> bool:
        """Tells whether a task head computes one loss for the whole segment."""
        return self.label >= 0 or bool(self.targets)


@dataclass(frozen=True)
class Batch:
    """Rows as tensors. Positions are flat indices into the B·L hidden states.

    Attributes:
        input_ids: (B, L) int64.
        position_ids: (B, L) int64, restarting at every segment; every padding token is its own segment.
        token_type_ids: (B, L) int64.
        lm_at: (N,) int64, index of the hidden state that predicts each supervised token.
        lm_target: (N,) int64, the supervised token.
        lm_key: (N,) int64, its segment's key.
        lm_pretrain: (N,) bool, whether it belongs to the pretraining stream.
        first_at: (M,) int64, index of the first token of each labelled segment.
        last_at: (M,) int64, index of its last token.
        read_at: (M,) int64, index of its last token that is not the padding token (its first if there is none). The heads of
            causal models in transformers read this token.
        label: (M,) int64, its class; -1 for none.
        targets: (M, K) float32, its target.
        label_key: (M,) int64, its key.
        finetune_at: (T,) int64, index of every token of the fine-tuning stream.
        row_tokens: (B,) int64, tokens of each row, without padding; 0 for a row in which nothing is learned, which only fills
            up a process's share.
        boundaries: (S + 1,) int32, index of the first token of each of the S segments, and B·L. The padding at a row's end is
            one segment.
        longest: tokens of the longest of these segments.
        longest_labelled: tokens of the longest labelled segment; 0 for none.
        num_tokens: tokens in the rows, without padding.
        lm_weight: (N,) float64, the weight of each supervised token's segment; None if all are 1.
        label_weight: (M,) float64, the weight of each labelled segment; None if all are 1.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor
    lm_at: Tensor
    lm_target: Tensor
    lm_key: Tensor
    lm_pretrain: Tensor
    first_at: Tensor
    last_at: Tensor
    read_at: Tensor
    label: Tensor
    targets: Tensor
    label_key: Tensor
    finetune_at: Tensor
    row_tokens: Tensor
    boundaries: Tensor
    longest: int
    longest_labelled: int
    num_tokens: int
    lm_weight: Tensor | None = None
    label_weight: Tensor | None = None

    def to(self, device: torch.device | str) -> Self:
        """Returns the batch on another device. A copy to a GPU is asynchronous: it does not wait for the GPU's earlier work."""
        to_gpu = torch.device(device).type == "cuda"

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            # Only a copy from page-locked memory is asynchronous.
            return value.pin_memory().to(device, non_blocking=True) if to_gpu and value.is_cpu else value.to(device)

        return type(self)(**{field.name: moved(getattr(self, field.name)) for field in fields(self)})


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assigns items to rows with best-fit decreasing: at most 11/9 of the minimum number of rows, usually close to the minimum.

    Args:
        lengths: length of each item, in tokens; at most `capacity`.
        capacity: maximum tokens per row.

    Returns:
        Indices of the items in each row; every index once.
    """
    rows: list[list[int]] = []
    free_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > capacity:
            raise ValueError(f"item {index} has {lengths[index]} tokens, a row holds {capacity}")
        slot = bisect_left(free_rows, (lengths[index], -1))
        if slot == len(free_rows):
            rows.append([index])
            free, row = capacity - lengths[index], len(rows) - 1
        else:
            free, row = free_rows.pop(slot)
            rows[row].append(index)
            free -= lengths[index]
        insort(free_rows, (free, row))
    return rows


def pack_narrow(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assigns items to rows that are as narrow as possible, since all rows of a step are padded to the widest row.

    Tries several widths up to `capacity` and takes the narrowest whose rows need at most 1 % more tokens, with padding, than
    those of the best width: attention costs more in wider rows.

    Args:
        lengths: length of each item, in tokens; at most `capacity`.
        capacity: maximum tokens per row.

    Returns:
        Indices of the items in each row; every index once.
    """
    if not lengths:
        return []
    total, narrowest = sum(lengths), max(lengths)
    fewest, most = -(-total // capacity), -(-total // narrowest) + 1
    numbers = sorted({round(fewest + (most - fewest) * i / (_WIDTHS - 1)) for i in range(_WIDTHS)})
    # Items never fill rows completely, so allow some slack.
    wanted = [math.ceil(total / number * slack) for number in numbers for slack in (1.01, 1.03)]
    widths = {min(capacity, max(narrowest, width)) for width in wanted} | {capacity}
    packings = []
    for width in sorted(widths):
        rows = pack(lengths, width)
        used = max(sum(lengths[i] for i in row) for row in rows)
        packings.append((len(rows) * used, used, rows))
    least = min(tokens for tokens, _, _ in packings)
    return min((packing for packing in packings if packing[0] <= 1.01 * least), key=lambda packing: packing[1])[2]


def width_of(row: Sequence[Segment]) -> int:
    """Returns the tokens in a row."""
    return sum(len(segment.tokens) for segment in row)


def collate(rows: Sequence[Sequence[Segment]], pad_id: int, label_all: bool = False, width_multiple: int = 1) -> Batch:
    """Converts rows to tensors, padded to the longest row.

    Args:
        rows: segments of each row.
        pad_id: token id for padding. Segments never attend to the padding, and it is never supervised. A text can contain
            the same token, for example where EOS is the padding token.
        label_all: treat every segment as labelled, even if its label is unknown.
        width_multiple: pad to a multiple of this width.
    """
    width = -(-max(width_of(row) for row in rows) // width_multiple) * width_multiple
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    position_ids = np.zeros((len(rows), width), np.int64)
    token_type_ids = np.zeros((len(rows), width), np.int64)
    lm_at, lm_target, lm_key, lm_pretrain = [], [], [], []
    labelled: list[tuple[int, Segment]] = []
    finetune_at = []
    boundaries = []
    num_tokens = 0
    for number, row in enumerate(rows):
        start = 0
        for segment in row:
            length, flat = len(segment.tokens), number * width + start
            boundaries.append(flat)
            input_ids[number, start : start + length] = segment.tokens
            position_ids[number, start : start + length] = np.arange(length)
            if segment.second_from >= 0:
                token_type_ids[number, start + segment.second_from : start + length] = 1
            if segment.num_supervised:
                at, target = _supervised(segment)
                lm_at.append(flat + at)
                lm_target.append(target)
                lm_key.append(np.full(len(at), segment.key, np.int64))
                lm_pretrain.append(np.full(len(at), segment.pretrain))
            if segment.labelled or label_all:
                labelled.append((flat, segment))
            if not segment.pretrain:
                finetune_at.append(np.arange(flat, flat + length))
            start += length
        if start < width:
            boundaries.append(number * width + start)
        num_tokens += start
    boundaries.append(len(rows) * width)
    segments = [segment for row in rows for segment in row]
    weighted = any(segment.weight != 1 for segment in segments)

    def joined(pieces: list[np.ndarray], dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate(pieces) if pieces else np.empty(0, dtype))

    def of_labelled(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        token_type_ids=torch.from_numpy(token_type_ids),
        lm_at=joined(lm_at, np.int64),
        lm_target=joined(lm_target, np.int64),
        lm_key=joined(lm_key, np.int64),
        lm_pretrain=joined(lm_pretrain, np.bool_),
        first_at=of_labelled([flat for flat, _ in labelled]),
        last_at=of_labelled([flat + len(segment.tokens) - 1 for flat, segment in labelled]),
        read_at=of_labelled([flat + _last_unlike(segment.tokens, pad_id) for flat, segment in labelled]),
        label=of_labelled([segment.label for _, segment in labelled]),
        targets=torch.tensor([segment.targets for _, segment in labelled], dtype=torch.float32),
        label_key=of_labelled([segment.key for _, segment in labelled]),
        finetune_at=joined(finetune_at, np.int64),
        row_tokens=torch.tensor(
            [width_of(row) if any(one.num_supervised or one.labelled for one in row) else 0 for row in rows],
            dtype=torch.int64,
        ),
        boundaries=torch.tensor(boundaries, dtype=torch.int32),
        longest=int(np.diff(boundaries).max()),
        longest_labelled=max((len(segment.tokens) for _, segment in labelled), default=0),
        num_tokens=num_tokens,
        lm_weight=joined([np.full(one.num_supervised, one.weight) for one in segments], np.float64)
        if weighted
        else None,
        label_weight=torch.tensor([segment.weight for _, segment in labelled], dtype=torch.float64)
        if weighted
        else None,
    )


def _last_unlike(tokens: np.ndarray, pad_id: int) -> int:
    """Returns the index of the last token that is not `pad_id`; 0 if there is none."""
    at = np.flatnonzero(np.asarray(tokens) != pad_id)
    return int(at[-1]) if len(at) else 0


def _supervised(segment: Segment) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions in the segment whose hidden states predict, and the predicted token ids."""
    if segment.masked is not None:
        assert segment.originals is not None
        return np.asarray(segment.masked, np.int64), np.asarray(segment.originals, np.int64)
    if segment.supervised is not None:
        at = np.asarray(segment.supervised, np.int64)
        return at - 1, np.asarray(segment.tokens, np.int64)[at]
    first = max(segment.supervised_from, 1)
    return np.arange(first - 1, len(segment.tokens) - 1), np.asarray(segment.tokens[first:], np.int64)
