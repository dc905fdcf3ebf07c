"""Finding held-out examples whose text occurs in training text, of either stream.

The measure of Brown et al. 2020 (GPT-3, appendix C): a held-out text is contaminated where it shares 13 words in a row
with a training text. A shorter one is where it is, as a whole, the same as a training text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

WORDS = 13

# Scripts without spaces between words: every character counts as a word.
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text, case and punctuation aside; Chinese and Japanese characters are words of their own."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def contaminated(held_out: Sequence[str], training: Iterable[str]) -> list[bool]:
    """Says for each held-out text whether it shares a passage with any training text.

    Memory grows with the held-out texts only; training texts are gone through once.
    """
    marks = [set(_marks(text)) for text in held_out]
    wanted = set().union(*marks)
    found: set[str] = set()
    for text in training:
        found.update(mark for mark in _marks(text) if mark in wanted)
    return [not found.isdisjoint(own) for own in marks]


def _marks(text: str) -> Iterator[str]:
    """Every 13 words in a row; of a shorter text, the whole of it, told apart from passages by a line end."""
    found = words(text)
    if len(found) < WORDS:
        yield " ".join(found or text.split()) + "\n"
    for start in range(len(found) - WORDS + 1):
        yield " ".join(found[start : start + WORDS])
