"""Every token is scored once, and later windows have context; masks share out the tokens among the passes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.evaluate.windows import ScoringWindow, count_windows, mask, mask_passes, windows


@given(length=st.integers(0, 400), max_length=st.integers(2, 64))
def test_every_token_but_the_first_is_scored_once(length: int, max_length: int) -> None:
    cut = list(windows(length, max_length))
    assert len(cut) == count_windows(np.array(length), max_length)
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
        (8, [ScoringWindow(0, 8, 1)]),
        (9, [ScoringWindow(0, 8, 1), ScoringWindow(4, 9, 8)]),
        (16, [ScoringWindow(0, 8, 1), ScoringWindow(4, 12, 8), ScoringWindow(8, 16, 12)]),
    ],
)
def test_windows_of_eight(length: int, expected: list[ScoringWindow]) -> None:
    assert list(windows(length, 8)) == expected


@given(length=st.integers(0, 400), max_length=st.integers(2, 64))
def test_every_token_is_scored_once_where_the_first_needs_no_context(length: int, max_length: int) -> None:
    cut = list(windows(length, max_length, scored_from=0))
    assert [position for window in cut for position in range(window.scored_from, window.end)] == list(range(length))
    assert cut[1:] == list(windows(length, max_length))[1:]


@given(
    ordinary=st.sets(st.integers(0, 500)).map(sorted), passes=st.integers(2, 20), document=st.integers(0, 10_000),
    start=st.integers(0, 10_000),
)  # fmt: skip
def test_every_ordinary_token_is_masked_in_one_pass(
    ordinary: list[int], passes: int, document: int, start: int
) -> None:
    positions = np.array(ordinary, np.int64)
    found = [mask(positions, passes, document, start, turn) for turn in range(passes)]
    assert sorted(int(place) for chosen in found for place in chosen) == ordinary
    sizes = [len(chosen) for chosen in found]
    assert max(sizes) - min(sizes) <= 1
    again = [mask(positions, passes, document, start, turn) for turn in range(passes)]
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))


def test_masks_differ_from_window_to_window() -> None:
    places = [mask(np.arange(100), 7, *which, 0).tolist() for which in ((0, 0), (0, 8), (1, 0))]
    assert places[0] != places[1] != places[2] != places[0]


@pytest.mark.parametrize(("probability", "passes"), [(0.15, 7), (0.4, 2), (0.9, 2), (0.05, 20), (0.3, 3)])
def test_passes(probability: float, passes: int) -> None:
    assert mask_passes(probability) == passes
