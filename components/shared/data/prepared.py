"""Tokenised documents on disk. `prepare` writes them; training and evaluation read them.

A data folder holds `manifest.json` (`DataManifest`) and one folder for each split (that with the training split of the
pretraining stream also holds `control`, that with the training split of the fine-tuning stream a data folder `watch`):

    tokens.npy           int32, (tokens,)         all documents, one after the other
    offsets.npy          int64, (documents + 1,)  document i is tokens[offsets[i]:offsets[i + 1]]
    supervised_from.npy  int32, (documents,)      first supervised token of each document (1 for pretraining text)
    labels.npy           int32, (documents,)      classification: index of the label; -1 otherwise
    targets.npy          float32, (documents, K)  multi-label: 0 or 1 for each label; regression: the value (K = 1);
                                                  question answering: first and last token of the answer in the
                                                  document (K = 2; 0 and 0 if it is not in the document); else K = 0
    second_from.npy      int32, (documents,)      question answering: first token of the second text (the context), which has
                                                  token type 1; -1 otherwise
    supervised.npy       bool, (tokens,)          chats: whether each token is learned; no such file where that follows from
                                                  supervised_from, which in chats is the first token after the last prompt
    records.jsonl        one object per document: id, source, bytes, and text (or prompt and completion) as read; question
                         answering: question, context, answers (list of texts). Each document is a window over the
                         context: `context_from` (its first context token) and `offsets` ([from, to] in the context's
                         characters for each of its context tokens). Chats: also `messages` and `tools` as read

Pretraining text starts with the tokenizer's BOS (or EOS, if it has no BOS) and ends with EOS. For classification examples and
prompts, the tokenizer itself adds special tokens, as it does for the deployed model; completions end with EOS. Arrays are
memory-mapped, so memory use does not grow with the data set.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..artifacts import read_json, read_jsonl, write_json, write_jsonl
from ..config import Task
from ..errors import RefusedError
from .tallies import Tally

QUARANTINE = "quarantine.jsonl"
"""File in the training folder with the records that were left out, if there are any."""
WATCH = "watch"
"""Data folder in the training folder of the fine-tuning stream: the sample on which trainings are watched, with the splits
`control` (pieces of the control text, in a random order) and `dev` (some labelled examples)."""
Split = Literal["train", "control", "dev", "test"]
"""`control` is pretraining text that no model trains on; forgetting budgets are controlled on it, and trainings watched."""
MASK = "supervised.npy"


class SplitInfo(BaseModel):
    """Counts of one split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    documents: int
    tokens: int
    bytes: int
    """UTF-8 bytes of the text."""
    digest: str
    """SHA-256 over all arrays."""
    supervised_tokens: int | None = None
    """Chats: learned tokens; null if that follows from the documents."""


class DataManifest(BaseModel):
    """`manifest.json` of a data folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["mixtune-data/1"] = "mixtune-data/1"
    stream: Literal["pretrain", "finetune"]
    task: Task | None = None
    labels: list[str] | None = None
    """Classification and multi-label: label names, in the order of their indices."""
    max_length: int
    vocabulary_size: int
    source: str
    splits: dict[Split, SplitInfo]
    ends_with_eos: bool = False
    """Heads that read one hidden state: whether the tokenizer appends EOS to every text (see model/tokenizer.py)."""
    mlflow_run: str | None = None
    notes: dict[str, Any] = Field(default_factory=dict)
    """Statistics of `prepare`: records read, labels, contamination."""
    tallies: list[Tally] = Field(default_factory=list)
    """What was lost or changed on the way from the source, in all splits."""

    @property
    def has_chats(self) -> bool:
        """Tells whether documents are chats."""
        return any(info.supervised_tokens is not None for info in self.splits.values())

    @property
    def digest(self) -> str:
        """Returns a digest of all splits."""
        joined = " ".join(f"{name}:{info.digest}" for name, info in sorted(self.splits.items()))
        return hashlib.sha256(joined.encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes the manifest. Called last, so that a folder with a manifest is complete."""
        write_json(Path(folder) / "manifest.json", self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: str | Path) -> DataManifest:
        """Reads the manifest of a data folder.

        Raises:
            RefusedError: if the folder contains no prepared data.
        """
        return cls.model_validate(read_json(Path(folder) / "manifest.json", "data prepared by mixtune"))


@dataclass(frozen=True)
class Document:
    """One tokenised document before it is written.

    Attributes:
        tokens: token ids, special tokens included.
        record: at least `id`, `source`, `bytes`; `text`, or `prompt` and `completion`; `label` in classification.
        supervised_from: index of the first supervised token; at least 1, since the first token has no context.
        label: classification: index of the label, else -1.
        targets: multi-label, regression and question answering: K numbers, as `targets.npy` has them.
        second_from: question answering: first token of token type 1.
        supervised: chats: (length,) bool, whether each token is learned.
    """

    tokens: Sequence[int] | np.ndarray
    record: dict[str, Any]
    supervised_from: int = 1
    label: int = -1
    targets: Sequence[float] = ()
    second_from: int = -1
    supervised: np.ndarray | None = None


class Documents:
    """The documents of one split, memory-mapped.

    Attributes:
        offsets: (documents + 1,) int64.
        supervised_from: (documents,) int32.
        labels: (documents,) int32.
        targets: (documents, K) float32.
        second_from: (documents,) int32.
    """

    def __init__(self, folder: str | Path, split: Split) -> None:
        self.folder = Path(folder) / split
        if not (self.folder / "tokens.npy").is_file():
            raise RefusedError(f"{self.folder}: holds no prepared documents")
        self.flat: np.ndarray = np.load(self.folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        self.offsets: np.ndarray = np.load(self.folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
        self.supervised_from: np.ndarray = np.load(self.folder / "supervised_from.npy", allow_pickle=False)
        self.labels: np.ndarray = np.load(self.folder / "labels.npy", allow_pickle=False)
        self.targets: np.ndarray = np.load(self.folder / "targets.npy", allow_pickle=False)
        self.second_from: np.ndarray = np.load(self.folder / "second_from.npy", allow_pickle=False)
        mask = self.folder / MASK
        self._supervised = np.load(mask, mmap_mode="r", allow_pickle=False) if mask.is_file() else None
        self._chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def tokens(self, index: int) -> np.ndarray:
        """Returns the token ids of one document, (length,) int32."""
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    def supervised(self, start: int, end: int) -> np.ndarray | None:
        """Returns the learned tokens in a range of tokens without its first one, as indices from its start.

        Returns:
            (learned,) int64; None if the documents hold no chats, so that `supervised_from` tells.
        """
        return None if self._supervised is None else 1 + np.flatnonzero(self._supervised[start + 1 : end])

    def records(self) -> list[dict[str, Any]]:
        """Returns the records of all documents, in order."""
        return list(self.iter_records())

    def iter_records(self) -> Iterator[dict[str, Any]]:
        """Yields the records of all documents, in order."""
        records = read_jsonl(self.folder / "records.jsonl")
        return records if self._chosen is None else compress(records, self._chosen)

    def choose(self, chosen: np.ndarray) -> Documents:
        """Returns some of the documents of a whole split, in memory.

        Args:
            chosen: (documents,) bool.
        """
        lengths = np.diff(self.offsets)
        of_tokens = np.repeat(chosen, lengths)
        part = copy(self)
        part.flat, part.offsets = self.flat[of_tokens], np.concatenate([[0], np.cumsum(lengths[chosen])])
        for name in _SMALL:
            setattr(part, name, getattr(self, name)[chosen])
        part._supervised = None if self._supervised is None else self._supervised[of_tokens]
        part._chosen = chosen
        return part


def write_split(folder: str | Path, split: Split, documents: Iterable[Document]) -> SplitInfo:
    """Writes one split of a data folder and returns its counts."""
    target = Path(folder) / split
    target.mkdir(parents=True, exist_ok=True)
    lengths, supervised_from, labels, targets, second_from, records, pieces = [], [], [], [], [], [], []
    masks: list[np.ndarray | None] = []
    for document in documents:
        pieces.append(np.asarray(document.tokens, dtype=np.int32))
        lengths.append(len(document.tokens))
        supervised_from.append(document.supervised_from)
        labels.append(document.label)
        targets.append(document.targets)
        second_from.append(document.second_from)
        records.append(document.record)
        masks.append(document.supervised)
    arrays: dict[str, np.ndarray] = {
        "tokens": np.concatenate(pieces) if pieces else np.empty(0, np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "supervised_from": np.asarray(supervised_from, np.int32),
        "labels": np.asarray(labels, np.int32),
        "targets": np.asarray(targets, np.float32).reshape(len(lengths), -1)
        if lengths
        else np.empty((0, 0), np.float32),
        "second_from": np.asarray(second_from, np.int32),
    }
    if any(mask is not None for mask in masks):
        made = [
            np.arange(length) >= first if mask is None else mask
            for mask, length, first in zip(masks, lengths, supervised_from, strict=True)
        ]
        arrays["supervised"] = np.concatenate(made)
    digest = hashlib.sha256()
    for name, array in arrays.items():
        np.save(target / f"{name}.npy", array, allow_pickle=False)
        digest.update(array.tobytes())
    write_jsonl(target / "records.jsonl", records)
    supervised = arrays.get("supervised")
    return SplitInfo(
        supervised_tokens=None if supervised is None else int(supervised.sum()),
        documents=len(lengths),
        tokens=int(sum(lengths)),
        bytes=sum(record["bytes"] for record in records),
        digest=digest.hexdigest(),
    )


def merge_splits(
    folder: str | Path, split: Split, parts: Sequence[Path], num_bytes: np.ndarray, kept: np.ndarray | None = None
) -> SplitInfo:
    """Writes one split that consists of parts of it. Memory depends on the size of the largest part.

    Args:
        folder: data folder to write to.
        parts: data folders that hold the split, in order. They have N documents in all.
        num_bytes: (N,) UTF-8 bytes of each document.
        kept: (N,) whether each document is kept; None keeps all.

    Returns:
        The counts of the split.
    """
    target = Path(folder) / split
    target.mkdir(parents=True, exist_ok=True)
    lengths = [np.diff(np.load(part / split / "offsets.npy", allow_pickle=False)) for part in parts]
    kept = np.ones(len(num_bytes), bool) if kept is None else kept
    masks = np.split(kept, np.cumsum([len(one) for one in lengths])[:-1])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.empty(0, np.int64), *lengths])[kept])]).astype(np.int64)
    digest = hashlib.sha256()
    shape = (int(offsets[-1]),)

    def write_of_tokens(name: str, dtype: type, load: Callable[[Path], np.ndarray]) -> None:
        with (target / name).open("wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part, length, mask in zip(parts, lengths, masks, strict=True):
                values = load(part / split)
                piece = (values if mask.all() else values[np.repeat(mask, length)]).tobytes()
                file.write(piece)
                digest.update(piece)

    write_of_tokens("tokens.npy", np.int32, lambda part: np.load(part / "tokens.npy", allow_pickle=False))
    np.save(target / "offsets.npy", offsets, allow_pickle=False)
    digest.update(offsets.tobytes())
    for name, empty in _SMALL.items():
        pieces = [np.load(part / split / f"{name}.npy", allow_pickle=False) for part in parts]
        pieces = [piece[mask] for piece, mask in zip(pieces, masks, strict=True) if mask.any()]
        array = np.concatenate(pieces) if pieces else empty
        np.save(target / f"{name}.npy", array, allow_pickle=False)
        digest.update(array.tobytes())
    (target / MASK).unlink(missing_ok=True)
    if has_mask := any((part / split / MASK).is_file() for part in parts):
        write_of_tokens(MASK, np.bool_, _mask)
    with (target / "records.jsonl").open("wb") as out:
        for part, mask in zip(parts, masks, strict=True):
            with (part / split / "records.jsonl").open("rb") as file:
                if mask.all():
                    shutil.copyfileobj(file, out, 1 << 20)
                else:
                    out.writelines(line for line, is_kept in zip(file, mask.tolist(), strict=True) if is_kept)
    learned = np.load(target / MASK, mmap_mode="r", allow_pickle=False) if has_mask else None
    return SplitInfo(
        documents=len(offsets) - 1,
        tokens=shape[0],
        bytes=int(num_bytes[kept].sum()),
        digest=digest.hexdigest(),
        supervised_tokens=None if learned is None else int(np.count_nonzero(learned)),
    )


def _mask(folder: Path) -> np.ndarray:
    """Returns whether each token of a split is learned, (tokens,) bool; in a split without chats, from `supervised_from` on."""
    if (folder / MASK).is_file():
        mask: np.ndarray = np.load(folder / MASK, allow_pickle=False)
        return mask
    offsets = np.load(folder / "offsets.npy", allow_pickle=False)
    first = np.load(folder / "supervised_from.npy", allow_pickle=False)
    lengths = np.diff(offsets)
    return np.arange(offsets[-1]) >= np.repeat(offsets[:-1] + first, lengths)


_SMALL: dict[str, np.ndarray] = {
    "supervised_from": np.empty(0, np.int32),
    "labels": np.empty(0, np.int32),
    "targets": np.empty((0, 0), np.float32),
    "second_from": np.empty(0, np.int32),
}
"""Arrays with few bytes for each document, and what they are without documents."""
