"""Makes the documents of a split of what the tokenizer made of its rows, and counts what is lost or changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..shared.config import Task
from ..shared.data.prepared import Document, Split
from ..shared.data.tallies import Tallies
from .encoded import EncodedDocument, EncodedRow
from .encoding import encode
from .rows import Item, labels_of, num_bytes
from .tokenization import Encoder

ID_CHARACTERS = 16
"""Hexadecimal digits of a document's id."""


@dataclass
class Found:
    """What is counted while the documents of a split are made.

    Attributes:
        split: the split.
        tallies: counts of what was lost or changed.
        counts: question answering: numbers of examples, windows, and windows that contain a whole answer; chats: numbers of
            turns of the assistant that are learned, and of those in a sequence of their own.
        problems: a sentence for each example that cannot be converted, and its content.
    """

    split: Split
    tallies: Tallies
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, Any]] = field(default_factory=list)

    def add(self, item: Item, counts: Iterable[tuple[str, int, int]]) -> None:
        """Adds what is lost or changed in an example."""
        for kind, count, of in counts:
            self.tallies.add(kind, self.split, item.row.where, count, of)


@dataclass(frozen=True)
class ItemBatch:
    """Examples of one split.

    Attributes:
        items: the examples.
        encoded: what another process made of each with the same encoder; None of those that are to be encoded here.
        labels: label names, in the order of their indices.
        found_in: for each held-out example, the streams whose training text contains its text; None if that was not looked for.
    """

    items: list[Item]
    encoded: list[EncodedRow | None]
    labels: list[str] | None = None
    found_in: Sequence[Sequence[str]] | None = None


def documents_of(batch: ItemBatch, task: Task | None, encoder: Encoder, found: Found) -> list[Document]:
    """Returns the documents of some examples.

    Args:
        batch: the examples.
        task: the task; None for the pretraining stream.
        encoder: encoder that tokenises the texts.
        found: counts of what is lost are added to it.
    """
    missing = [item for item, one in zip(batch.items, batch.encoded, strict=True) if one is None]
    rest = iter(encode(missing, task, encoder))
    of_texts: dict[tuple[str, str], tuple[Item, Iterable[tuple[str, int, int]]]] = {}
    place = {label: index for index, label in enumerate(batch.labels or [])}
    documents: list[Document] = []
    for number, (item, one) in enumerate(zip(batch.items, batch.encoded, strict=True)):
        row = next(rest) if one is None else one
        record = _record(item)
        if batch.found_in is not None:
            streams = batch.found_in[number]
            record |= {"contaminated": bool(streams), "contaminated_by": list(streams)}
        if item.row.chat is not None:
            record |= {"messages": item.row.chat.messages} | (
                {"tools": item.row.chat.tools} if item.row.chat.tools else {}
            )
        found.add(item, row.counts)
        found.counts.update(row.numbers)
        of_texts |= {(role, item.row.values[role]): (item, counts) for role, counts in row.of_texts.items()}
        if row.problem is not None:
            found.problems.append(row.problem)
        for document in row.documents:
            if not document.is_apart or found.split == "train":
                found.add(item, document.counts)
                found.counts.update(document.numbers)
                documents.append(_document(item, record, document, place))
    for item, counts in of_texts.values():
        found.add(item, counts)
    return documents


def _document(item: Item, record: dict[str, Any], document: EncodedDocument, place: dict[str, int]) -> Document:
    """Returns a document with its target.

    Args:
        place: index of each label; empty if the task has none.
    """
    own, label, targets = record | document.extra, -1, document.targets
    if item.row.number is not None:
        own["label"], targets = item.row.number, [item.row.number]
    elif "label" in item.row.values:
        label = place[item.row.values["label"]]
    elif place:
        own["labels"] = list(labels_of(item.row))
        targets = [float(one in own["labels"]) for one in place]
    return Document(
        document.tokens, own, document.supervised_from, label, targets, document.second_from, document.supervised
    )


def _record(item: Item) -> dict[str, Any]:
    return {
        "id": item.key[:ID_CHARACTERS], "source": item.row.where, "bytes": num_bytes(item.row), **item.row.values
    }  # fmt: skip
