"""Detects held-out examples whose text occurs in training text of either stream.

The measure of Brown et al. 2020 (GPT-3, appendix C): a held-out text is contaminated if it shares 13 consecutive words with a
training text. A text with fewer words is contaminated if it equals a whole training text.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .long_texts import pieces_of

WORDS = 13
BATCH_MARKS = 1_000_000

# In scripts without spaces between words, every character counts as a word.
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """Returns the words of a text, without case and punctuation. Each Chinese or Japanese character is a word."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def contaminated(held_out: Iterable[Sequence[str]], training: Iterable[str]) -> list[bool]:
    """Returns for each held-out example whether any of its texts shares a passage with any training text.

    Memory use depends on the held-out texts only: 8 bytes for each of their words. Texts are read once.

    Args:
        held_out: texts of each example.
        training: training texts.
    """
    own, counts = array("q"), array("q")
    for texts in held_out:
        before = len(own)
        for text in texts:
            own.extend(_marks(text))
        counts.append(len(own) - before)
    marks = np.array(own, np.int64)
    wanted = np.unique(marks)
    found = np.zeros(len(wanted), bool)
    batch = array("q")
    for text in training:
        batch.extend(_marks(text))
        if len(batch) > BATCH_MARKS:
            _note(found, wanted, batch)
            batch = array("q")
    _note(found, wanted, batch)
    hit = np.concatenate([[0], np.cumsum(found[np.searchsorted(wanted, marks)])]) if len(marks) else np.zeros(1, int)
    ends = np.cumsum(np.array(counts, np.int64))
    starts = ends - np.array(counts, np.int64)
    return (hit[ends] > hit[starts]).tolist() if len(ends) else []


def _note(found: np.ndarray, wanted: np.ndarray, batch: array[int]) -> None:
    """Notes which of the wanted marks, which are sorted, are in a batch."""
    if not len(wanted) or not batch:
        return
    marks = np.array(batch, np.int64)
    places = np.minimum(np.searchsorted(wanted, marks), len(wanted) - 1)
    found[places[wanted[places] == marks]] = True


def _marks(text: str) -> Iterator[int]:
    """Yields a hash of every 13 consecutive words; for a shorter text of the whole text, with a line end to distinguish it.

    Two different passages have the same hash with a probability of 2^-64. Hashes differ from process to process.
    """
    found: list[str] = []
    for piece in pieces_of(text):  # the last words of a piece begin passages that end in the next one
        found = found[max(0, len(found) - WORDS + 1) :] + words(piece)
        for start in range(len(found) - WORDS + 1):
            yield hash(" ".join(found[start : start + WORDS]))
    if len(found) < WORDS:
        yield hash(" ".join(found or text.split()) + "\n")
