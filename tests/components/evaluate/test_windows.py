"""Every token but the first is scored once, and later windows have context."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.evaluate.windows import Window, windows


@given(length=st.integers(0, 400), max_length=st.integers(2, 64))
def test_every_token_but_the_first_is_scored_once(length: int, max_length: int) -> None:
    cut = list(windows(length, max_length))
    scored = [position for window in cut for position in range(window.scored_from, window.end)]
    assert scored == list(range(1, length))
    for window in cut:
        assert 0 <= window.start < window.scored_from < window.end <= length
        assert window.end - window.start <= max_length
    for window in cut[1:]:
        assert window.scored_from - window.start >= max_length / 2


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, []),
        (1, []),
        (8, [Window(0, 8, 1)]),
        (9, [Window(0, 8, 1), Window(4, 9, 8)]),
        (16, [Window(0, 8, 1), Window(4, 12, 8), Window(8, 16, 12)]),
    ],
)
def test_windows_of_eight(length: int, expected: list[Window]) -> None:
    assert list(windows(length, 8)) == expected
