"""Removes duplicates and creates splits: pure functions of the content and the seed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from .long_texts import is_long

_WHITE_SPACE = re.compile(r"\s+")
HeldOut = Literal["dev", "test"]
Keys = np.ndarray
"""(N, 32) uint8, digests of contents."""
DIGEST_BYTES = 32
TRAIN, DEV, TEST = range(3)
"""Splits in an array of splits."""


def digest(content: bytes) -> bytes:
    """Returns the SHA-256 of a content, 32 bytes."""
    return hashlib.sha256(content).digest()


def fold(*texts: str) -> bytes:
    """Returns a digest that is equal for texts that differ only in case and white space."""
    return digest("\0".join(map(_folded, texts)).encode())


def _folded(text: str) -> str:
    folded = text.casefold()
    # Splitting is four times as fast, but needs many times the memory of the text.
    return _WHITE_SPACE.sub(" ", folded).strip() if is_long(text) else " ".join(folded.split())


def exact(*texts: str) -> bytes:
    """Returns a digest that is equal for equal texts only."""
    return digest("\0".join(texts).encode())


def first_of_each(digests: np.ndarray) -> np.ndarray:
    """Returns for each of N rows the first row with the same digest, (N,).

    Args:
        digests: (N, 8 or more) uint8. The first 8 bytes count: of 100 million different rows, two have the same ones with a
            probability below 0.001.
    """
    _, first, inverse = np.unique(numbers_of(digests), return_index=True, return_inverse=True)
    return np.asarray(first[inverse])


def numbers_of(digests: np.ndarray) -> np.ndarray:
    """Returns the first 8 bytes of each digest as a number, (N,) uint64. Numbers have the order of the digests."""
    return np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0].astype(np.uint64)


def draw(keys: Keys, count: int, seed: int) -> np.ndarray:
    """Draws `count` of N keys. Whether a key is drawn depends on its rank, a function of the key and the seed only.

    Returns:
        Whether each key is drawn, (N,).
    """
    drawn = np.zeros(len(keys), bool)
    drawn[np.argsort(ranks(keys, seed, "draw"), kind="stable")[:count]] = True
    return drawn


def shuffled(keys: Keys, seed: int) -> np.ndarray:
    """Returns an order of N keys, (N,), that depends on the keys and the seed only. Every prefix is a random sample."""
    return np.argsort(ranks(keys, seed, "order"), kind="stable")


def cut(keys: Keys, groups: Sequence[str], fractions: Mapping[HeldOut, float], seed: int) -> np.ndarray | None:
    """Assigns each of N keys to a split.

    Every split gets its fraction of the keys, rounded, and at least one key. Groups (labels) are distributed over the splits in
    proportion (systematic sampling with a random start in each group). The last key of each group is kept for training, so that
    no label is only in held-out data.

    Args:
        keys: digests of the contents, without duplicates.
        groups: group of each key.
        fractions: fraction of each split to create; other splits are not created.
        seed: seed of the splits.

    Returns:
        The split of each key, (N,): TRAIN, DEV or TEST. None if there are too few keys for all splits.
    """
    names, group = np.unique(np.asarray(groups, object), return_inverse=True)
    order = np.lexsort((ranks(keys, seed, "split"), group))
    sizes = np.bincount(group, minlength=len(names))
    within = np.arange(len(keys)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    starts = np.array([int(_rank(seed, "group", str(name))[:13], 16) / 16**13 for name in names])
    of_each = group[order]
    places = (within + starts[of_each]) / sizes[of_each]
    free = order[within < sizes[of_each] - 1]
    free = free[np.lexsort((numbers_of(keys[free]), places[within < sizes[of_each] - 1]))]
    splits = np.full(len(keys), TRAIN, np.int8)
    taken = 0
    for name, split in (("test", TEST), ("dev", DEV)):
        if name in fractions:
            count = max(1, round(fractions[name] * len(keys)))  # type: ignore[index]
            if taken + count > len(free):
                return None
            splits[free[taken : taken + count]] = split
            taken += count
    return splits


def ranks(keys: Keys, seed: int, purpose: str) -> np.ndarray:
    """Returns a pseudorandom number for each key, (N,) uint64."""
    found = (int(_rank(seed, purpose, key.tobytes().hex())[:16], 16) for key in keys)
    return np.fromiter(found, np.uint64, len(keys))


def _rank(seed: int, purpose: str, key: str) -> str:
    return hashlib.sha256(f"{seed} {purpose} {key}".encode()).hexdigest()
