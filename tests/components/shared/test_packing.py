"""Rows as narrow as they can be: nothing lost, nothing too long, little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtune.components.shared.model.packing import Segment, collate, pack, pack_narrow


def area(rows: list[list[int]], lengths: list[int]) -> tuple[int, int]:
    """Tokens with padding, and the width."""
    width = max(sum(lengths[i] for i in row) for row in rows)
    return len(rows) * width, width


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=60), capacity=st.integers(50, 90))
def test_narrow_rows_hold_every_item_once_and_never_take_more_room_than_full_ones(
    lengths: list[int], capacity: int
) -> None:
    rows = pack_narrow(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
    if lengths:
        tokens, width = area(rows, lengths)
        full_tokens, full_width = area(pack(lengths, capacity), lengths)
        assert tokens <= 1.01 * full_tokens
        assert width <= full_width


@pytest.mark.parametrize(
    ("examples", "windows", "capacity", "most"),
    [(16, [240], 512, 1.04), (32, [107] * 5, 128, 1.05), (48, [], 128, 1.06)],
)
def test_short_examples_and_text_leave_little_padding(
    examples: int, windows: list[int], capacity: int, most: float
) -> None:
    draw = np.random.default_rng(0)
    real = padded = 0
    for _ in range(30):
        lengths = windows + [int(one) for one in draw.integers(17, 51, examples)]
        padded += area(pack_narrow(lengths, capacity), lengths)[0]
        real += sum(lengths)
    assert padded < most * real


def test_full_windows_stay_rows() -> None:
    assert sorted(pack_narrow([64] * 5, 64)) == [[0], [1], [2], [3], [4]]


def test_an_item_that_no_row_can_hold_is_an_error() -> None:
    with pytest.raises(ValueError, match="has 51 tokens"):
        pack_narrow([3, 51], 50)


def test_a_width_can_be_padded_on() -> None:
    row = [Segment(np.arange(5), 1), Segment(np.arange(4), 1)]
    assert collate([row], 0).input_ids.shape == (1, 9)
    batch = collate([row, row[:1]], 0, width_multiple=8)
    assert batch.input_ids.shape == (2, 16)
    assert batch.lm_at.tolist() == [0, 1, 2, 3, 5, 6, 7, 16, 17, 18, 19]
