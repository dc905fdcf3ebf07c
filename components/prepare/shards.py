"""Tokenises a stream in shards: in several processes if there is much of it, and after a restart from the finished shards.

Each shard is a folder that holds some documents of one split in the format of a data folder. Memory depends on the size of a
shard, not of the stream.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from ..shared.artifacts import write_json
from ..shared.checkpoints.store import folder_of, is_url
from ..shared.config import Task
from ..shared.data.prepared import Split, SplitInfo, merge_splits, write_split
from ..shared.data.problems import Problems
from ..shared.data.tallies import Tallies
from ..shared.errors import RefusedError
from ..shared.running.context import Context
from .documents import ID_CHARACTERS, Found, ItemBatch, documents_of
from .rows import Gathered, RowPart, Rows
from .tokenization import Encoder

if TYPE_CHECKING:
    from concurrent.futures import Executor

SHARD_BYTES = 2 << 20
SHARD_ROWS = 10_000
DONE = "found.json"
"""Written last: a shard that has it is complete."""


@dataclass(frozen=True)
class Shard:
    """Rows of one split that are tokenised together.

    Attributes:
        split: the split.
        folder: folder of the shard.
        rows: the rows.
        task: the task; None for the pretraining stream.
        labels: label names, in the order of their indices.
        found_in: see `ItemBatch`.
        embedded: whether the text is the embedded one.
    """

    split: Split
    folder: Path
    rows: RowPart
    task: Task | None
    labels: list[str] | None
    found_in: list[list[str]] | None
    embedded: bool

    @property
    def is_done(self) -> bool:
        """Tells whether the shard is complete."""
        return (self.folder / DONE).is_file()

    def make(self, encoder: Encoder) -> None:
        """Tokenises the rows and writes the shard."""
        found = Found(self.split, Tallies(self.embedded))
        items = list(self.rows.items())
        batch = ItemBatch(items, self.rows.encoded_rows(), self.labels, self.found_in)
        documents = documents_of(batch, self.task, encoder, found)
        aside = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.part")
        shutil.rmtree(aside, ignore_errors=True)
        write_split(aside, self.split, documents)
        place = {item.key[:ID_CHARACTERS]: number for number, item in enumerate(items)}
        sizes = [(place[one.record["id"]], one.record["bytes"], len(one.tokens)) for one in documents]
        np.save(aside / "sizes.npy", np.array(sizes, np.int64).reshape(-1, 3).T)
        write_json(
            aside / DONE, {"tallies": found.tallies.to_json(), "counts": dict(found.counts), "problems": found.problems}
        )
        shutil.rmtree(self.folder, ignore_errors=True)
        aside.rename(self.folder)


def shards_of(
    gathered: Gathered,
    split: Split,
    folder: Path,
    task: Task | None,
    found_in: Sequence[list[str]] | None,
    embedded: bool,
) -> list[Shard]:
    """Divides a split into shards of about `SHARD_BYTES`."""
    numbers = gathered.splits[split]
    return [
        Shard(
            split,
            folder / f"{split}-{number:06d}",
            gathered.rows.part(numbers[low:high]),
            task,
            gathered.labels,
            list(found_in[low:high]) if found_in is not None else None,
            embedded,
        )
        for number, (low, high) in enumerate(divided(gathered.rows, numbers))
    ]


def divided(rows: Rows, numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Divides rows, in the given order, into parts of about `SHARD_BYTES`. Yields the first place of each part, and its end."""
    sizes = np.cumsum(rows.lines.sizes(numbers))
    place = np.maximum(sizes // SHARD_BYTES, np.arange(len(numbers)) // SHARD_ROWS) if len(numbers) else numbers
    return pairwise([0, *(np.flatnonzero(np.diff(place)) + 1).tolist(), len(numbers)])


def make_shards(
    shards: Mapping[Split, Sequence[Shard]],
    encoder: Encoder,
    folder: WorkFolder,
    context: Context,
) -> None:
    """Makes all shards that are not complete.

    Args:
        shards: shards of each split.
        encoder: encoder that tokenises the texts.
        folder: folder of the shards.
        context: used to show the progress.
    """
    every = [shard for inside in shards.values() for shard in inside]
    total = sum(len(shard.rows) for shard in every)
    waiting = [shard for shard in every if not shard.is_done]
    done = total - sum(len(shard.rows) for shard in waiting)
    if done:
        context.say(f"{len(every) - len(waiting)} of {len(every)} shards are there from an earlier attempt")
    with context.progress(total, "texts", "tokenizing", done=done) as progress:
        for shard in made_in_processes(waiting, encoder):
            folder.keep(shard.folder)
            tokens = np.load(shard.folder / shard.split / "tokens.npy", mmap_mode="r").size
            progress.advance(len(shard.rows), tokens=tokens)


class Makeable(Protocol):
    """A part of the work that one process does."""

    def make(self, encoder: Encoder) -> None: ...


AnyMakeable = TypeVar("AnyMakeable", bound=Makeable)


def made_in_processes(parts: Sequence[AnyMakeable], encoder: Encoder) -> Iterator[AnyMakeable]:
    """Makes parts, as many at a time as there are cores, and yields each when it is complete, in their order."""
    workers = min(usable_cores(), len(parts))
    # A forked process shares the memory of what is imported and loaded. A process with threads cannot be forked safely.
    if workers < 2 or threading.active_count() > 1 or sys.platform != "linux":
        for part in parts:
            part.make(encoder)
            yield part
        return
    global _encoder
    _encoder = encoder
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        yield from _in_order(pool, parts, 2 * workers)


def _in_order(pool: Executor, parts: Sequence[AnyMakeable], ahead: int) -> Iterator[AnyMakeable]:
    """Yields made parts in their order. Only a few are handed out ahead, since each carries arrays."""
    pending = []
    for part in parts:
        pending.append((part, pool.submit(_make, part)))
        if len(pending) > ahead:
            first, result = pending.pop(0)
            result.result()
            yield first
    for part, result in pending:
        result.result()
        yield part


_encoder: Encoder | None = None
"""What forked processes find."""


def _make(part: Makeable) -> None:
    assert _encoder is not None
    part.make(_encoder)


@dataclass(frozen=True)
class Made:
    """The N documents of a split in its finished shards.

    Attributes:
        shards: the shards.
        rows: (N,) number of each document's row.
        num_bytes: (N,) UTF-8 bytes.
        tokens: (N,) tokens.
    """

    shards: Sequence[Shard]
    rows: np.ndarray
    num_bytes: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, shards: Sequence[Shard], numbers: np.ndarray) -> Made:
        """Reads the sizes of the documents.

        Args:
            shards: shards of a split.
            numbers: numbers of all rows of the split.
        """
        none = np.empty(0, np.int64)
        sizes = [np.load(shard.folder / "sizes.npy") for shard in shards]
        starts = np.cumsum([0, *(len(shard.rows) for shard in shards)])
        places = [start + inside[0] for start, inside in zip(starts, sizes, strict=False)]
        num_bytes, tokens = (np.concatenate([none, *(inside[row] for inside in sizes)]) for row in (1, 2))
        return cls(shards, numbers[np.concatenate([none, *places])], num_bytes, tokens)

    def merge(self, folder: str | Path, kept: np.ndarray) -> SplitInfo:
        """Writes the documents that are kept to a data folder, and returns their counts."""
        parts = [shard.folder for shard in self.shards]
        return merge_splits(folder, self.shards[0].split, parts, self.num_bytes, kept)


def counts_of(shards: Mapping[Split, Sequence[Shard]], gathered: Gathered, problems: Problems) -> None:
    """Adds what was counted in the shards to the tallies and the notes of a stream, and collects the problems of examples."""
    for split, inside in shards.items():
        for shard in inside:
            found: dict[str, Any] = json.loads((shard.folder / DONE).read_text(encoding="utf-8"))
            gathered.tallies.merge(Tallies.from_json(found["tallies"]))
            for sentence, content in found["problems"]:
                problems.add_detail(sentence, content)
            for name, count in found["counts"].items():
                of_splits = gathered.notes.setdefault(name, {})
                of_splits[split] = of_splits.get(split, 0) + count


def usable_cores() -> int:
    """Returns the number of cores that this process may use: its affinity, and the CPU limit of its container."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


class WorkFolder:
    """The folder of a stream's shards.

    Args:
        path: local folder.
        url: fsspec URL that keeps a copy of each shard, from which a later attempt on another machine goes on; None if the
            local folder outlives this machine, or if nothing does.
    """

    def __init__(self, path: Path, url: str | None = None) -> None:
        self.path, self._files, self._url = path, None, ""
        path.mkdir(parents=True, exist_ok=True)
        if url is not None:
            from ..shared.checkpoints.remote import open_url

            self._files, self._url = open_url(url)
            self._fetch()

    def _fetch(self) -> None:
        assert self._files is not None
        if self._files.exists(self._url):
            for found in self._files.ls(self._url, detail=False):
                name = found.rstrip("/").rsplit("/", 1)[-1]
                if self._files.exists(f"{found}/{DONE}") and not (self.path / name).exists():
                    self._files.get(f"{found}/", f"{self.path / name}/", recursive=True)

    def keep(self, shard: Path) -> None:
        """Copies a finished shard to the URL."""
        if self._files is not None:
            for file in sorted(shard.rglob("*"), key=lambda file: file.name == DONE):
                if file.is_file():
                    self._files.put_file(str(file), f"{self._url}/{file.relative_to(self.path)}")

    def remove(self) -> None:
        """Deletes the shards."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._files is not None and self._files.exists(self._url):
            self._files.rm(self._url, recursive=True)


@contextmanager
def work_folder(checkpoint_dir: str, name: str, otherwise: Path) -> Iterator[WorkFolder]:
    """Provides the folder of a stream's shards. It is kept only if the block is interrupted or fails for another attempt.

    Args:
        checkpoint_dir: value of MIXTUNE_CHECKPOINT_DIR; empty if nothing outlives this attempt.
        name: name of the folder, which identifies the stream's content.
        otherwise: folder to use if the checkpoint folder is remote or not set.
    """
    if checkpoint_dir and not is_url(checkpoint_dir):
        work = WorkFolder(folder_of(checkpoint_dir) / name)
    else:
        work = WorkFolder(otherwise, f"{checkpoint_dir.rstrip('/')}/{name}" if checkpoint_dir else None)
    try:
        yield work
    except RefusedError:
        work.remove()
        raise
    work.remove()
