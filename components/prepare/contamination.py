"""Detects held-out examples whose text occurs in training text of either stream.

The measure of Brown et al. 2020 (GPT-3, appendix C): a held-out text is contaminated if it shares 13 consecutive words with a
training text. A text with fewer words is contaminated if it equals a whole training text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

WORDS = 13

# In scripts without spaces between words, every character counts as a word.
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """Returns the words of a text, without case and punctuation. Each Chinese or Japanese character is a word."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def contaminated(held_out: Sequence[Sequence[str]], training: Iterable[str]) -> list[bool]:
    """Returns for each held-out example whether any of its texts shares a passage with any training text.

    Memory use depends on the held-out texts only; training texts are read once.

    Args:
        held_out: texts of each example.
        training: training texts.
    """
    marks = [{mark for text in texts for mark in _marks(text)} for texts in held_out]
    wanted = set().union(*marks)
    found: set[str] = set()
    for text in training:
        found.update(mark for mark in _marks(text) if mark in wanted)
    return [not found.isdisjoint(own) for own in marks]


def _marks(text: str) -> Iterator[str]:
    """Yields every 13 consecutive words; for a shorter text the whole text, with a line end to distinguish it from passages."""
    found = words(text)
    if len(found) < WORDS:
        yield " ".join(found or text.split()) + "\n"
    for start in range(len(found) - WORDS + 1):
        yield " ".join(found[start : start + WORDS])
