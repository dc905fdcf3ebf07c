"""Names of sources: that of a document, without the line or row, and URLs with a password in them."""

from __future__ import annotations

import re

NO_NAME = "(no name)"
"""Source of documents without a source name."""
_PLACE = re.compile(r", (?:line|item|row|passage) \d+$")
_PACKAGE = re.compile(r"[/,]")
PASSWORD_REFUSED = (
    "must not carry a password; hand it over in the environment, as fsspec's own configuration reads it "
    "(FSSPEC_S3_KEY and FSSPEC_S3_SECRET, for example)"
)

# User, colon, password, @ in any URL of a chain such as simplecache::https://... GitHub URLs, github://owner:repository@path,
# look the same but contain no password.
_PASSWORD = re.compile(r"(?<!\bgithub)://[^/?#:]*:[^/?#]+@")


def source_of(where: str | None, embedded: bool) -> str:
    """Returns the source in the `source` field of a record, which also names a line or row.

    Args:
        embedded: whether the text is the embedded one, whose fields name packages, modules and passages. Returns the package.
    """
    named = (where or "").strip()
    return (_PACKAGE.split(named)[0] if embedded else _PLACE.sub("", named)) or NO_NAME


def has_password(source: str) -> bool:
    """Tells whether a source is a URL, or a chain of URLs, that contains a password."""
    return _PASSWORD.search(source) is not None
