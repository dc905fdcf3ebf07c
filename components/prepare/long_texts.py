"""Long texts in pieces, so that memory does not grow with the longest text: a tokenizer needs about 100 bytes for each byte."""

from __future__ import annotations

from collections.abc import Iterator

PIECE_CHARACTERS = 1 << 18
MAX_EXAMPLE_CHARACTERS = 4_000_000
"""Longer examples and chats are refused: they are read as a whole, and no model reads as much at once."""


def is_long(text: str) -> bool:
    """Tells whether a text has more than one piece."""
    return len(text) > PIECE_CHARACTERS


def pieces_of(text: str) -> Iterator[str]:
    """Divides a text into pieces of at most `PIECE_CHARACTERS`: behind a line end, else before a space, else anywhere."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end, least = start + PIECE_CHARACTERS, start + PIECE_CHARACTERS // 2
        line_end, space = text.rfind("\n", least, end), text.rfind(" ", least, end)
        cut = line_end + 1 if line_end > 0 else space if space > 0 else end
        yield text[start:cut]
        start = cut
    yield text[start:]
