"""Windows over long documents, so that every token but the first is scored once, with context before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `end` of a document, of which those from `scored_from` on are scored.

    Attributes:
        scored_from: position in the document, above `start`.
    """

    start: int
    end: int
    scored_from: int


def windows(length: int, max_length: int) -> Iterator[Window]:
    """Cuts a document into overlapping windows with a stride of half a window.

    The first window scores all but its first token, which has no context. Every later one scores what those before it did
    not reach, so its scored tokens have at least half a window before them.

    Args:
        length: of the document, in tokens.
        max_length: of a window; at least 2.
    """
    stride = max_length // 2
    start, scored_from = 0, 1
    while scored_from < length:
        end = min(start + max_length, length)
        yield Window(start, end, scored_from)
        start, scored_from = start + stride, end
