"""Removes duplicates and creates splits: pure functions of the content and the seed."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from ..shared.data.prepared import Split

HeldOut = Literal["dev", "test"]
T = TypeVar("T")


def fold(*texts: str) -> str:
    """Returns a digest that is equal for texts that differ only in case and white space."""
    folded = "\0".join(" ".join(text.casefold().split()) for text in texts)
    return hashlib.sha256(folded.encode()).hexdigest()


def exact(*texts: str) -> str:
    """Returns a digest that is equal for equal texts only."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def draw(keys: Sequence[str], count: int, seed: int) -> set[str]:
    """Draws `count` of the keys. Whether a key is drawn depends on its rank, a function of the key and the seed only."""
    return set(sorted(keys, key=lambda key: _rank(seed, "draw", key))[:count])


def shuffled(items: Iterable[T], seed: int, key: Callable[[T], str]) -> list[T]:
    """Shuffles items in an order that depends on contents and seed only. Every prefix is a random sample."""
    return sorted(items, key=lambda item: _rank(seed, "order", key(item)))


def cut(
    keys: Sequence[str], groups: Sequence[str], fractions: Mapping[HeldOut, float], seed: int
) -> dict[str, Split] | None:
    """Assigns each key to a split.

    Every split gets its fraction of the keys, rounded, and at least one key. Groups (labels) are distributed over the splits in
    proportion (systematic sampling with a random start in each group). The last key of each group is kept for training, so that
    no label is only in held-out data.

    Args:
        keys: digests of the contents, without duplicates.
        groups: group of each key.
        fractions: fraction of each split to create; other splits are not created.
        seed: seed of the splits.

    Returns:
        The split of each key, or None if there are too few keys for all splits.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for key, group in zip(keys, groups, strict=True):
        members[group].append(key)
    places: list[tuple[float, str]] = []
    for group, inside in members.items():
        start = int(_rank(seed, "group", group)[:13], 16) / 16**13
        ordered = sorted(inside, key=lambda key: _rank(seed, "split", key))
        places += [((number + start) / len(ordered), key) for number, key in enumerate(ordered[:-1])]
    free = [key for _, key in sorted(places)]
    split: dict[str, Split] = dict.fromkeys(keys, "train")
    taken = 0
    for name in ("test", "dev"):
        if name in fractions:
            count = max(1, round(fractions[name] * len(keys)))
            if taken + count > len(free):
                return None
            split.update(dict.fromkeys(free[taken : taken + count], name))
            taken += count
    return split


def _rank(seed: int, purpose: str, key: str) -> str:
    return hashlib.sha256(f"{seed} {purpose} {key}".encode()).hexdigest()
