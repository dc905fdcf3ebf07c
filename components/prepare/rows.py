"""The rows of a stream on disk, so that memory grows with their number and not with the text.

Rows are identified by their number, in the order in which they were read. What deduplication and splitting need of them is held
in arrays; the rows themselves are read back when they are tokenised.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..shared.data.chats import Chat
from ..shared.data.prepared import Split
from ..shared.data.records import GROUP, Row
from ..shared.data.source_names import source_of
from ..shared.data.tallies import Part, Tallies
from ..shared.data.values import ReferenceAnswer
from .encoded import EncodedRow
from .splitting import DIGEST_BYTES, Keys, digest, exact, fold
from .stored import Stored, StoredPart

UNIT_BYTES = 8
"""Bytes of a digest that are compared."""
SHOWN_ROWS = 3
"""Number of affected rows of each kind that are noted."""
ROLES_WITHOUT_TEXT = frozenset({"label", GROUP})


@dataclass(frozen=True)
class Item:
    """A document or an example.

    Attributes:
        key: digest of its text, see `duplicates`; unique in a stream.
        row: the row as read.
    """

    key: str
    row: Row

    @property
    def text(self) -> str:
        """Returns the whole text; of two texts, such as prompt and completion, both."""
        return "\n".join(texts_of(self.row))


def texts_of(row: Row) -> list[str]:
    """Returns the texts of a row, without its label."""
    return [text for role, text in row.values.items() if role not in ROLES_WITHOUT_TEXT]


def num_bytes(row: Row) -> int:
    """Returns the UTF-8 bytes of the texts of a row."""
    return sum(len(text.encode()) for text in texts_of(row))


def labels_of(row: Row) -> tuple[str, ...]:
    """Returns the label of a row, or its labels in multi-label."""
    return (row.values["label"],) if "label" in row.values else row.labels


class RowWriter:
    """Appends rows to a file.

    Args:
        file: file to create.
        embedded: whether the text is the embedded one, see `source_of`.
    """

    def __init__(self, file: Path, embedded: bool) -> None:
        self._path, self._file, self._embedded = file, file.open("wb"), embedded
        self._end = self._num_chats = 0
        self._ends, self._sources, self._labels = array("q"), array("i"), array("i")
        self._targets, self._numbers, self._answers = array("Q"), array("d"), array("i")
        self._keys, self._units, self._groups, self._reasons = bytearray(), bytearray(), bytearray(), bytearray()
        self._source_names: dict[str, int] = {}
        self._label_sets: dict[tuple[str, ...], int] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, row: Row, key: bytes, reason: int = 0) -> None:
        """Appends a row.

        Args:
            row: the row.
            key: digest by which duplicates are recognised.
            reason: why its text is to be left out, see `TextFilter`.
        """
        fields: dict[str, Any] = {"values": row.values, "where": row.where}
        if row.labels:
            fields["labels"] = row.labels
        if row.number is not None:
            fields["number"] = row.number
        if row.answers:
            fields["answers"] = [(answer.text, answer.start) for answer in row.answers]
        if row.chat is not None:
            fields["chat"] = row.chat.to_json()
            self._num_chats += 1
        # A file name can hold half of a surrogate pair: a byte that is not UTF-8.
        line = json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._file.write(line)
        self._end += len(line)
        self._ends.append(self._end)
        labels = labels_of(row)
        source = source_of(row.where, self._embedded)
        self._sources.append(self._source_names.setdefault(source, len(self._source_names)))
        self._labels.append(self._label_sets.setdefault(labels, len(self._label_sets)))
        target = repr((labels, row.number, row.answers)).encode()
        self._targets.append(int.from_bytes(digest(target)[:8], "big"))
        self._numbers.append(np.nan if row.number is None else row.number)
        self._answers.append(len(row.answers))
        self._keys += key
        self._reasons.append(reason)
        shared = row.values.get("context", row.values.get("prompt"))
        self._units += (key if shared is None else fold(shared))[:UNIT_BYTES]
        if GROUP in row.values:
            self._groups += exact(row.values[GROUP])[:UNIT_BYTES]

    def finish(self) -> Rows:
        """Closes the file and returns the rows."""
        self._file.close()

        def digests(of: bytearray, size: int) -> np.ndarray:
            return np.frombuffer(of, np.uint8).reshape(-1, size)

        return Rows(
            lines=Stored((self._path,), np.array(self._ends, np.int64)),
            keys=digests(self._keys, DIGEST_BYTES),
            units=digests(self._units, UNIT_BYTES),
            groups=digests(self._groups, UNIT_BYTES) if self._groups else None,
            targets=np.array(self._targets, np.uint64),
            numbers=np.array(self._numbers, np.float64),
            answers=np.array(self._answers, np.int32),
            sources=np.array(self._sources, np.int32),
            source_names=list(self._source_names),
            labels=np.array(self._labels, np.int32),
            label_sets=list(self._label_sets),
            num_chats=self._num_chats,
            reasons=np.frombuffer(self._reasons, np.uint8),
        )


@dataclass(frozen=True)
class Rows:
    """The N rows of a stream.

    Attributes:
        lines: the rows in files.
        keys: (N, 32) uint8, digests by which duplicates are recognised.
        units: (N, 8) uint8, digests of the text that rows share and that must stand in one split: a context or a prompt.
        groups: (N, 8) uint8, digests of the groups; None if there is no group column.
        targets: (N,) uint64, digests of the targets.
        numbers: (N,) regression: the targets.
        answers: (N,) question answering: numbers of answers.
        sources: (N,) indices in `source_names`.
        source_names: files, data sets or packages.
        labels: (N,) indices in `label_sets`.
        label_sets: all combinations of labels that occur.
        reasons: (N,) uint8, why each row is to be left out, see `TextFilter`; 0 if it is not.
        num_chats: number of rows that are chats.
        source_ends: (S,) end of the rows of each of the S sources.
        encoded: what the tokenizer made of each row, if another process has done that: an `EncodedRow` as bytes, or no bytes.
        affected: by kind of tally, the first rows that `tally` found affected.
    """

    lines: Stored
    keys: Keys
    units: np.ndarray
    groups: np.ndarray | None
    targets: np.ndarray
    numbers: np.ndarray
    answers: np.ndarray
    sources: np.ndarray
    source_names: list[str]
    labels: np.ndarray
    label_sets: list[tuple[str, ...]]
    reasons: np.ndarray
    num_chats: int = 0
    source_ends: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    encoded: Stored | None = None
    affected: dict[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lines.ends)

    def source_numbers(self, numbers: np.ndarray) -> np.ndarray:
        """Returns for each row the number of its source, in the order in which sources were read."""
        return np.searchsorted(self.source_ends, numbers, side="right")

    def part(self, numbers: np.ndarray) -> RowPart:
        """Returns some of the rows, in the given order, as a small object that can be sent to another process."""
        encoded = self.encoded.part(numbers) if self.encoded is not None else None
        return RowPart(self.lines.part(numbers), self.keys[numbers], encoded)

    def items(self, numbers: np.ndarray) -> Iterator[Item]:
        """Reads rows from the file, in the given order."""
        return self.part(numbers).items()

    def label_counts(self, numbers: np.ndarray) -> Counter[str]:
        """Counts the labels of rows."""
        counts: Counter[str] = Counter()
        for place, count in enumerate(np.bincount(self.labels[numbers], minlength=len(self.label_sets)).tolist()):
            if count:
                counts.update(dict.fromkeys(self.label_sets[place], count))
        return counts

    def having(self, label: str, numbers: np.ndarray) -> np.ndarray:
        """Returns those of the rows that have a label."""
        sets = [place for place, labels in enumerate(self.label_sets) if label in labels]
        return numbers[np.isin(self.labels[numbers], sets)]

    def tally(
        self, tallies: Tallies, kind: str, part: Part, numbers: np.ndarray, found: np.ndarray, detail: str = ""
    ) -> None:
        """Counts affected rows by source, and notes the first of them.

        Args:
            numbers: rows.
            found: whether each of them is affected.
        """
        first = self.affected.setdefault(kind, [])
        first += numbers[found][: SHOWN_ROWS - len(first)].tolist()
        totals = np.bincount(self.sources[numbers], minlength=len(self.source_names))
        counts = np.bincount(self.sources[numbers][found], minlength=len(self.source_names))
        for name, count, total in zip(self.source_names, counts.tolist(), totals.tolist(), strict=True):
            if total:
                tallies.add(kind, part, name, count, total, detail)


@dataclass
class Gathered:
    """A stream's splits.

    Attributes:
        rows: all rows that were read.
        splits: numbers of the rows of each split, in an order that depends on the seed.
        labels: classification and multi-label: all label names, in the order of their indices.
        notes: numbers of rows that were read and removed.
        tallies: counts of what was lost or changed.
    """

    rows: Rows
    splits: dict[Split, np.ndarray]
    labels: list[str] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    tallies: Tallies = field(default_factory=Tallies)


@dataclass(frozen=True)
class RowPart:
    """N rows in files.

    Attributes:
        lines: the rows.
        keys: (N, 32) digests.
        encoded: what the tokenizer made of each, see `Rows`.
    """

    lines: StoredPart
    keys: Keys
    encoded: StoredPart | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def items(self) -> Iterator[Item]:
        """Reads the rows from the files."""
        for line, key in zip(self.lines, self.keys, strict=True):
            yield Item(key.tobytes().hex(), _row(line))

    def encoded_rows(self) -> list[EncodedRow | None]:
        """Reads what the tokenizer made of each row; None of a row that is yet to be encoded."""
        if self.encoded is None:
            return [None] * len(self)
        return [EncodedRow.from_bytes(stored) if stored else None for stored in self.encoded]


def _row(line: bytes) -> Row:
    fields = json.loads(line.decode("utf-8", "surrogatepass"))
    return Row(
        fields["values"],
        fields["where"],
        labels=tuple(fields.get("labels", ())),
        number=fields.get("number"),
        answers=tuple(ReferenceAnswer(text, start) for text, start in fields.get("answers", ())),
        chat=Chat(**fields["chat"]) if "chat" in fields else None,
    )
