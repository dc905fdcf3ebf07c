"""Packed rows: several documents in one row, none of which sees another.

Position ids start again at every segment. With no attention mask given, transformers reads the segments off the position
ids and lets attention stay inside each (block-diagonal under SDPA and eager, variable-length kernels under
FlashAttention). Shapes: B rows, L tokens in a row, N supervised tokens, M classified segments.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """One attention-isolated piece of a row.

    Attributes:
        tokens: (length,) token ids.
        supervised_from: index of the first supervised token; at least 1, `len(tokens)` for none.
        label: index of the class; -1 for none.
        key: whatever the caller wants to recognise the segment by.
        pretrain: whether it comes from the pretraining stream.
    """

    tokens: np.ndarray
    supervised_from: int = 1
    label: int = -1
    key: int = 0
    pretrain: bool = False

    @property
    def num_supervised(self) -> int:
        """Tokens that are predicted, after the label shift."""
        return len(self.tokens) - max(self.supervised_from, 1)


@dataclass(frozen=True)
class Batch:
    """Rows as tensors. Positions are flat indices into the B·L hidden states.

    Attributes:
        input_ids: (B, L) int64.
        position_ids: (B, L) int64, starting again at every segment; every padding token is a segment of its own.
        lm_at: (N,) int64, the hidden state that predicts each supervised token.
        lm_target: (N,) int64, the supervised token.
        lm_key: (N,) int64, its segment's key.
        lm_pretrain: (N,) bool, whether it belongs to the pretraining stream.
        class_at: (M,) int64, the last token of each classified segment.
        class_target: (M,) int64, its label; -1 for none.
        class_key: (M,) int64.
        num_tokens: tokens in the rows without padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    lm_at: Tensor
    lm_target: Tensor
    lm_key: Tensor
    lm_pretrain: Tensor
    class_at: Tensor
    class_target: Tensor
    class_key: Tensor
    num_tokens: int

    def to(self, device: torch.device | str) -> Self:
        """The batch on another device."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in values.items()}
        return type(self)(**moved)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts items into rows, best-fit decreasing: at most 11/9 of the fewest rows possible, in practice nearly the fewest.

    Args:
        lengths: length of each item, in tokens; none above `capacity`.
        capacity: tokens a row can hold.

    Returns:
        Indices of the items in each row; every index once.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > capacity:
            raise ValueError(f"item {index} has {lengths[index]} tokens, a row holds {capacity}")
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            rows.append([index])
            free, row = capacity - lengths[index], len(rows) - 1
        else:
            free, row = room.pop(place)
            rows[row].append(index)
            free -= lengths[index]
        insort(room, (free, row))
    return rows


def collate(rows: Sequence[Sequence[Segment]], pad_id: int, classify: bool = False) -> Batch:
    """Makes tensors of rows, padded to the longest.

    Args:
        rows: segments of each row.
        pad_id: token id for padding; never attended to by a segment, never supervised.
        classify: take a class position for every segment, also where its label is not known.
    """
    width = max(sum(len(segment.tokens) for segment in row) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    position_ids = np.zeros((len(rows), width), np.int64)
    lm_at, lm_target, lm_key, lm_pretrain = [], [], [], []
    class_at, class_target, class_key = [], [], []
    num_tokens = 0
    for number, row in enumerate(rows):
        start = 0
        for segment in row:
            length = len(segment.tokens)
            input_ids[number, start : start + length] = segment.tokens
            position_ids[number, start : start + length] = np.arange(length)
            flat, first = number * width + start, max(segment.supervised_from, 1)
            if length > first:
                lm_at.append(np.arange(flat + first - 1, flat + length - 1))
                lm_target.append(np.asarray(segment.tokens[first:], np.int64))
                lm_key.append(np.full(length - first, segment.key, np.int64))
                lm_pretrain.append(np.full(length - first, segment.pretrain))
            if classify or segment.label >= 0:
                class_at.append(flat + length - 1)
                class_target.append(segment.label)
                class_key.append(segment.key)
            start += length
        num_tokens += start

    def joined(pieces: list[np.ndarray], dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate(pieces) if pieces else np.empty(0, dtype))

    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        lm_at=joined(lm_at, np.int64),
        lm_target=joined(lm_target, np.int64),
        lm_key=joined(lm_key, np.int64),
        lm_pretrain=joined(lm_pretrain, np.bool_),
        class_at=torch.tensor(class_at, dtype=torch.int64),
        class_target=torch.tensor(class_target, dtype=torch.int64),
        class_key=torch.tensor(class_key, dtype=torch.int64),
        num_tokens=num_tokens,
    )
