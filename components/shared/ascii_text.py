"""Spells text in ASCII, for terminals and servers that cannot show or store all characters."""

from __future__ import annotations

import codecs
import sys
import unicodedata

_NAMES = {
    "λ": "lambda",
    "Λ": "Lambda",
    "α": "alpha",
    "Δ": "Delta",
    "δ": "delta",
    "–": "-",
    "—": "-",
    "−": "-",
    "·": "*",
    "…": "...",
    "←": "<-",
    "→": "->",
}


def to_ascii(text: str) -> str:
    """Converts text to ASCII: Greek letters by name, accents dropped, other characters as escape sequences.

    >>> to_ascii("λ = 0.3, café")
    'lambda = 0.3, cafe'
    """
    spelled = "".join(_NAMES.get(character, character) for character in text)
    plain = "".join(c for c in unicodedata.normalize("NFKD", spelled) if not unicodedata.combining(c))
    return plain.encode("ascii", "backslashreplace").decode("ascii")


def spell_in_output() -> None:
    """Makes standard output and error spell what their encoding lacks, instead of failing.

    The encoding is that of the terminal or of the locale: a Latin-1 terminal has no λ.
    """
    codecs.register_error("mixtune.spell", _spell)
    for stream in (sys.stdout, sys.stderr):
        # Not every replacement of a standard stream (a notebook's, a test's) can be changed.
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="mixtune.spell")


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return to_ascii(error.object[error.start : error.end]), error.end
