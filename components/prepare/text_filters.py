"""Finds texts that are too short, too long or repeat themselves."""

from __future__ import annotations

from dataclasses import dataclass

from .contamination import words

PASSAGE_WORDS = 5
REASONS = ("too_short", "too_long", "repetitive")
"""Kinds of tallies of what is left out."""


@dataclass(frozen=True)
class TextFilter:
    """Conditions that a text meets to be kept; None is no condition.

    Attributes:
        min_characters: least number of characters.
        max_characters: largest number of characters.
        max_repetition: largest share of the text that can be repeated, see `repetition`.
    """

    min_characters: int | None = None
    max_characters: int | None = None
    max_repetition: float | None = None

    def reason(self, text: str) -> int:
        """Returns 0 if a text is kept, or n if it is left out for the n-th of `REASONS`."""
        if self.min_characters is not None and len(text) < self.min_characters:
            return 1
        if self.max_characters is not None and len(text) > self.max_characters:
            return 2
        return 3 if self.max_repetition is not None and repetition(text) > self.max_repetition else 0


def repetition(text: str) -> float:
    """Returns the share of a text that it said before, from 0 to 1.

    It is the larger one of two shares from Rae et al. 2021 ("Gopher", table A1): of the characters, those in lines that are
    equal to an earlier line; of the words, those in passages of five words that occurred before.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    of_lines = sum(map(len, lines)) - sum(map(len, dict.fromkeys(lines)))
    found = words(text)
    seen: set[tuple[str, ...]] = set()
    repeated = end = 0  # words in repeated passages, and the end of the last of these
    for start in range(len(found) - PASSAGE_WORDS + 1):
        passage = tuple(found[start : start + PASSAGE_WORDS])
        if passage in seen:
            repeated += start + PASSAGE_WORDS - max(start, end)
            end = start + PASSAGE_WORDS
        seen.add(passage)
    return max(of_lines / max(1, sum(map(len, lines))), repeated / max(1, len(found)))
