"""The held-out data of both streams, on which models are evaluated."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..shared.config import EMBEDDED, Task
from ..shared.data.prepared import DataManifest, Documents, Split
from ..shared.data.records import GROUP
from ..shared.data.tallies import Tallies, Tally
from ..shared.task_kinds import TASK_KINDS
from .sampling import TextSample, draw_examples, draw_text
from .texts import Overlap

SPLITS: tuple[Split, ...] = ("dev", "test")


@dataclass(frozen=True)
class HeldOut:
    """The held-out data of both streams."""

    text: DataManifest
    labelled: DataManifest
    text_folder: str
    labelled_folder: str
    max_examples: int | None = None
    """Maximum number of labelled examples of each split; None means all."""

    @property
    def task(self) -> Task:
        """Returns the task of the labelled examples."""
        assert self.labelled.task is not None
        return self.labelled.task

    def tallies(self, max_new_tokens: int | None) -> dict[str, list[Tally]]:
        """Returns what was lost in each stream: what `prepare` counted, and references longer than `max_new_tokens`."""
        long = Tallies(embedded=self.labelled.source == EMBEDDED)
        for split in SPLITS if max_new_tokens is not None else ():
            documents = Documents(self.labelled_folder, split)
            lengths = np.diff(documents.offsets) - documents.supervised_from - 1  # EOS needs no place in an answer
            for record, length in zip(documents.records(), lengths.tolist(), strict=True):
                long.add("long_references", split, record["source"], length > max_new_tokens)
        return {"pretrain": self.text.tallies, "finetune": [*self.labelled.tallies, *long.table()]}

    @cached_property
    def text_rows(self) -> dict[Split, list[dict[str, Any]]]:
        """Returns id, source, bytes and, if there is one, the group of each document of the pretraining stream, by split."""
        return {
            split: [
                {name: record[name] for name in ("id", "source", "bytes", GROUP) if name in record}
                for record in Documents(self.text_folder, split).iter_records()
            ]
            for split in SPLITS
        }

    def draw(self, split: Split, max_length: int, max_tokens: int | None, passes: int | None) -> TextSample:
        """Draws the text of a split that is read; see `draw_text`."""
        lengths = np.diff(Documents(self.text_folder, split).offsets)
        num_bytes = np.array([row["bytes"] for row in self.text_rows[split]], np.float64)
        return draw_text(lengths, num_bytes, max_length, max_tokens, passes, SPLITS.index(split))

    @cached_property
    def examples(self) -> dict[Split, Documents]:
        """Returns the labelled examples that are read, of the splits that hold some."""
        found = {
            split: Documents(self.labelled_folder, split) for split in SPLITS if self.labelled.splits[split].documents
        }
        if self.max_examples is None:
            return found
        return {
            split: documents.choose(
                draw_examples(
                    [record["id"] for record in documents.iter_records()],
                    documents.labels,
                    self.max_examples,
                    SPLITS.index(split),
                )
            )
            for split, documents in found.items()
        }

    def examples_in_split(self, split: Split) -> int:
        """Returns the number of labelled examples that a split holds; each window over a long context is a document."""
        if TASK_KINDS[self.task].document != "windows":
            return self.labelled.splits[split].documents
        return len({record["id"] for record in Documents(self.labelled_folder, split).iter_records()})

    @property
    def with_head(self) -> bool:
        """Tells whether the task uses a task head."""
        return TASK_KINDS[self.task].head is not None

    @cached_property
    def overlap(self) -> Overlap:
        """Returns the scorer of generated answers, with the references of both splits."""
        splits = (Documents(self.labelled_folder, split).records() for split in SPLITS)
        return Overlap(record["completion"].strip() for records in splits for record in records)


def describe_stream(manifest: DataManifest, folder: str) -> dict[str, Any]:
    """Describes the held-out data of one stream for the report."""
    splits = {split: manifest.splits[split].model_dump(mode="json") for split in SPLITS}
    for split in SPLITS:
        if manifest.task is None:
            splits[split]["text_digest"] = _text_digest(Documents(folder, split))
        elif TASK_KINDS[manifest.task].document == "windows":  # each window over a long context is a document
            splits[split]["examples"] = len({record["id"] for record in Documents(folder, split).iter_records()})
    return {"digest": manifest.digest, "source": manifest.source, "splits": splits}


def _text_digest(documents: Documents) -> str:
    """Returns a digest of the text, independent of the tokenizer: document ids are digests of the text."""
    rows = sorted((record["id"], record["bytes"]) for record in documents.iter_records())
    return hashlib.sha256(repr(rows).encode()).hexdigest()
