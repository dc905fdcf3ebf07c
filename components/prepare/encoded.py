"""What the tokenizer makes of a row, whatever its split. Another process can make it, and store it as bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .tokenization import Survival

MIN_BYTES_PER_TOKEN = 2
"""Fewer are a sign that the tokenizer does not know the language. GPT-2's has 4.0 in English, 2.5 in German, 1.6 in
Russian, 1.4 in Chinese and 1.2 in Korean (medians of conversations in `chatterbot-corpus`)."""
LEAST_BYTES = 100


class RowCounts(list[tuple[str, int, int]]):
    """Counts of what is lost or changed: kind of tally, affected units, all units."""

    def add(self, kind: str, count: int, of: int = 1) -> None:
        """Adds `of` units, of which `count` are affected."""
        self.append((kind, int(count), of))

    def survival(self, text: str, found: Survival) -> None:
        """Adds what became of a text."""
        self.add("unknown_tokens", found.unknown, found.tokens)
        self.add("lost_characters", found.lost, found.characters)
        self.num_tokens(text, found.tokens)

    def num_tokens(self, text: str, num_tokens: int) -> None:
        """Notes whether a text has many tokens for its length. Short texts, such as names and numbers, do not tell."""
        size = len(text.encode())
        if size >= LEAST_BYTES:
            self.add("many_tokens", size < MIN_BYTES_PER_TOKEN * num_tokens)


@dataclass
class EncodedDocument:
    """A token sequence of a row.

    Attributes:
        tokens: (length,) int32.
        extra: what its record has besides that of the row, or other than it.
        supervised_from, supervised, targets, second_from: see `Document`; targets of question answering alone.
        is_apart: whether it is a turn of a chat that is learned on its own, in training alone.
        counts: what is lost or changed in it.
        numbers: further numbers to add up.
    """

    tokens: Sequence[int] | np.ndarray
    extra: dict[str, Any] = field(default_factory=dict)
    supervised_from: int = 1
    supervised: np.ndarray | None = None
    targets: Sequence[float] = ()
    second_from: int = -1
    is_apart: bool = False
    counts: RowCounts = field(default_factory=RowCounts)
    numbers: dict[str, int] = field(default_factory=dict)


@dataclass
class EncodedRow:
    """The documents of a row, and what was found on the way to them.

    Attributes:
        documents: the documents, in order.
        counts: what is lost or changed.
        of_texts: the same for texts that several rows can share, by role: each text counts once in a shard.
        numbers: further numbers to add up.
        problem: why the row cannot be converted, as a sentence, and its content; None if it can.
    """

    documents: list[EncodedDocument] = field(default_factory=list)
    counts: RowCounts = field(default_factory=RowCounts)
    of_texts: dict[str, RowCounts] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    problem: tuple[str, Any] | None = None

    def to_bytes(self) -> bytes:
        """Returns all of it as bytes: a line of JSON, and the arrays."""
        arrays: list[bytes] = []
        documents = []
        for one in self.documents:
            tokens = np.asarray(one.tokens, np.int32)
            fields = {
                name: value
                for name, value in vars(one).items()
                if name not in ("tokens", "supervised") and value != _PLAIN[name]
            }
            arrays.append(tokens.tobytes())
            if one.supervised is not None:
                arrays.append(np.asarray(one.supervised, bool).tobytes())
            documents.append({**fields, "length": len(tokens), "masked": one.supervised is not None})
        header = {**vars(self), "documents": documents}
        return b"".join([json.dumps(header, separators=(",", ":")).encode(), b"\n", *arrays])

    @classmethod
    def from_bytes(cls, stored: bytes) -> EncodedRow:
        """Returns what `to_bytes` stored."""
        line, _, arrays = stored.partition(b"\n")
        header = json.loads(line)
        start, documents = 0, []
        for fields in header["documents"]:
            length, masked = fields.pop("length"), fields.pop("masked")
            tokens = np.frombuffer(arrays, np.int32, length, start)
            start += tokens.nbytes
            supervised = np.frombuffer(arrays, bool, length, start) if masked else None
            start += length * masked
            fields["counts"] = RowCounts(map(tuple, fields.get("counts", ())))
            documents.append(EncodedDocument(tokens, supervised=supervised, **fields))
        problem = header["problem"]
        return cls(
            documents,
            RowCounts(map(tuple, header["counts"])),
            {role: RowCounts(map(tuple, counts)) for role, counts in header["of_texts"].items()},
            header["numbers"],
            None if problem is None else tuple(problem),
        )


_PLAIN = vars(EncodedDocument(()))
"""The defaults, which are not stored."""
