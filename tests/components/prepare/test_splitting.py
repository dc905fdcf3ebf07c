"""Splits are a pure function of content and seed, and nothing falls into two of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtune.components.prepare import splitting
from mixtune.components.prepare.splitting import HeldOut, Keys, digest, exact, first_of_each, fold

fractions_of = st.fixed_dictionaries({}, optional={"dev": st.floats(0.01, 0.45), "test": st.floats(0.01, 0.45)})
keys_of = st.lists(st.integers(0, 10**6).map(str), unique=True, min_size=1, max_size=300)


SPLITS = ("train", "dev", "test")


def keys_from(names: Sequence[str]) -> Keys:
    """The digests of names."""
    return np.frombuffer(b"".join(digest(name.encode()) for name in names), np.uint8).reshape(-1, 32)


def cut(
    names: Sequence[str], groups: Sequence[str], fractions: dict[HeldOut, float], seed: int
) -> dict[str, str] | None:
    """The split of each name."""
    found = splitting.cut(keys_from(names), groups, fractions, seed)
    return None if found is None else {name: SPLITS[split] for name, split in zip(names, found, strict=True)}


def draw(names: Sequence[str], count: int, seed: int) -> set[str]:
    return {name for name, drawn in zip(names, splitting.draw(keys_from(names), count, seed), strict=True) if drawn}


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    return [names[place] for place in splitting.shuffled(keys_from(names), seed)]


def counts_of(total: int, fractions: dict[HeldOut, float]) -> dict[HeldOut, int]:
    return {name: max(1, round(share * total)) for name, share in fractions.items()}


@settings(max_examples=200)
@given(keys_of, fractions_of, st.integers(0, 100), st.randoms())
def test_every_key_is_in_one_split_and_fractions_are_met(
    keys: list[str], fractions: dict[HeldOut, float], seed: int, random: Random
) -> None:
    split = cut(keys, [""] * len(keys), fractions, seed)
    wanted = counts_of(len(keys), fractions)
    if split is None:
        assert sum(wanted.values()) >= len(keys)
        return
    assert sorted(split) == sorted(keys)
    found = Counter(split.values())
    assert {name: found[name] for name in wanted} == wanted
    assert found["train"] == len(keys) - sum(wanted.values()) >= 1
    shuffled_keys = random.sample(keys, len(keys))
    assert cut(shuffled_keys, [""] * len(keys), fractions, seed) == split


@settings(max_examples=200)
@given(st.lists(st.sampled_from("aaaabbc"), min_size=2, max_size=300), fractions_of, st.integers(0, 100))
def test_every_label_stays_in_train_and_is_spread_in_proportion(
    groups: list[str], fractions: dict[HeldOut, float], seed: int
) -> None:
    keys = [str(number) for number in range(len(groups))]
    split = cut(keys, groups, fractions, seed)
    if split is None:
        assert sum(counts_of(len(keys), fractions).values()) > len(keys) - len(set(groups))
        return
    for group, size in Counter(groups).items():
        inside = Counter(split[key] for key, other in zip(keys, groups, strict=True) if other == group)
        assert inside["train"] >= 1
        for name, count in counts_of(len(keys), fractions).items():
            assert abs(inside[name] - size * count / len(keys)) <= len(set(groups)) + 1


def test_another_seed_gives_other_splits() -> None:
    keys = [str(number) for number in range(100)]
    first, second = (cut(keys, [""] * 100, {"dev": 0.2, "test": 0.2}, seed) for seed in (0, 1))
    assert first is not None
    assert first != second


@pytest.mark.parametrize(("count", "possible"), [(1, False), (2, False), (3, True)])
def test_three_documents_are_the_least(count: int, possible: bool) -> None:
    keys = [str(number) for number in range(count)]
    split = cut(keys, [""] * count, {"dev": 0.05, "test": 0.05}, 0)
    assert (split is not None) == possible
    if split is not None:
        assert sorted(split.values()) == ["dev", "test", "train"]


def test_adding_documents_hardly_moves_the_others() -> None:
    keys = [str(number) for number in range(1000)]
    before = cut(keys, [""] * 1000, {"dev": 0.1, "test": 0.1}, 0)
    after = cut([*keys, "x", "y", "z"], [""] * 1003, {"dev": 0.1, "test": 0.1}, 0)
    assert before is not None
    assert after is not None
    assert sum(before[key] != after[key] for key in keys) <= 6


@given(keys_of, st.integers(1, 50), st.integers(0, 9))
def test_drawing_more_keeps_what_was_drawn(keys: list[str], count: int, seed: int) -> None:
    drawn = draw(keys, count, seed)
    assert len(drawn) == min(count, len(keys))
    assert drawn <= draw(keys, count + 5, seed)
    assert drawn == draw(keys[::-1], count, seed)


def test_order_does_not_depend_on_the_input_order() -> None:
    items = [str(number) for number in range(50)]
    assert shuffled(items, 3) == shuffled(items[::-1], 3)
    assert shuffled(items, 3) != shuffled(items, 4)
    assert sorted(shuffled(items, 3)) == sorted(items)


def test_exact_digests_heed_everything() -> None:
    assert exact("a", "b") == exact("a", "b")
    assert len({exact("a b"), exact("A b"), exact("a  b"), exact("a", "b"), exact("b", "a")}) == 5


def test_folding_pays_no_heed_to_case_and_white_space() -> None:
    assert fold("Ein  STRASSE\r\n") == fold("ein straße")
    assert fold("你 好") != fold("你好")
    assert fold("a", "b c") != fold("a b", "c")


@given(st.lists(st.sampled_from("abcdef"), max_size=40))
def test_the_first_of_each_is_kept(names: list[str]) -> None:
    keys = keys_from(names) if names else np.empty((0, 32), np.uint8)
    assert first_of_each(keys).tolist() == [names.index(name) for name in names]
