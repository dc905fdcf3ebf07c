"""Names the source of a document: the file, data set or package, without the line or row."""

from __future__ import annotations

import re

NO_NAME = "(no name)"
"""Source of documents without a source name."""
_PLACE = re.compile(r", (?:line|item|row|passage) \d+$")
_PACKAGE = re.compile(r"[/,]")


def source_of(where: str | None, embedded: bool) -> str:
    """Returns the source in the `source` field of a record, which also names a line or row.

    Args:
        embedded: whether the text is the embedded one, whose fields name packages, modules and passages. Returns the package.
    """
    named = (where or "").strip()
    return (_PACKAGE.split(named)[0] if embedded else _PLACE.sub("", named)) or NO_NAME
