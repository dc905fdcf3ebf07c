"""Reads a portion of a stream's files and tokenises it, before it is known which rows are kept, and in which split."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from ..shared.artifacts import ArtifactLike
from ..shared.config import Task
from ..shared.data.problems import Problems
from ..shared.data.sources import PARTS, named_sources
from ..shared.errors import RefusedError
from ..shared.running.context import Context
from .config import FinetuneData, PrepareStep, PretrainData
from .encoding import encode
from .reading import Portion, PortionRead, read_portion
from .rows import RowPart
from .shards import divided, made_in_processes
from .splitting import draw, first_of_each
from .stored import Stored
from .stream_tokenizer import adapt, encoder_of, has_chat_template, known_tokenizer, stream_of, task_of
from .tokenization import Encoder


def run(
    config: PrepareStep, *, context: Context, portion: str, tokenizer_in: ArtifactLike | None, rows: ArtifactLike
) -> None:
    """Reads one portion. What is wrong with its files is written to the output, so that `prepare` tells all problems at once.

    Args:
        config: the stream and the tokenizer.
        context: log, progress and tracking.
        portion: the files, as JSON; from `portions.py`.
        tokenizer_in: fine-tuning stream: tokenizer folder of the pretraining stream.
        rows: output, folder of the portion.
    """
    stream, which = stream_of(config), Portion.from_json(json.loads(portion))
    context.say(f"reading portion {which.number} of {which.of} of {stream.shown}")
    read = read_portion(stream, which, Path(rows.path))
    encoder = _encoder(config, tokenizer_in, read)
    if encoder is not None:
        read = replace(read, rows=replace(read.rows, encoded=_encoded(config, read, encoder, context)))
    read.save()
    rows.metadata.update({"portion": which.number, "rows": len(read.rows)})
    context.say(f"read {len(read.rows):,} records")


def _encoder(config: PrepareStep, tokenizer_in: ArtifactLike | None, read: PortionRead) -> Encoder | None:
    """Returns the encoder; None if `prepare` will have to train the tokenizer, or will refuse the data."""
    problems = Problems()
    try:
        known = known_tokenizer(config, tokenizer_in, problems)
        if known is None or problems or any(one.problems for one in read.segments):
            return None
        if read.rows.num_chats and not has_chat_template(config, known):
            return None
        adapt(known, config, tokenizer_in)
        return encoder_of(config, known)
    except RefusedError:  # `prepare` finds the same
        return None


def _encoded(config: PrepareStep, read: PortionRead, encoder: Encoder, context: Context) -> Stored:
    """Tokenises the rows that can be kept, each at the place that it has among all rows."""
    numbers = _candidates(stream_of(config), read, config.seed)
    borders = list(divided(read.rows, numbers))
    chunks = [
        _Chunk(read.folder / f"chunk-{number:06d}", read.rows.part(numbers[low:high]), task_of(config))
        for number, (low, high) in enumerate(borders)
    ]
    sizes = np.zeros(len(read.rows), np.int64)
    with (
        (read.folder / "encoded").open("wb") as file,
        context.progress(len(numbers), "texts", "tokenizing") as progress,
    ):
        for chunk, (low, high) in zip(made_in_processes(chunks, encoder), borders, strict=True):
            sizes[numbers[low:high]] = chunk.append_to(file)
            progress.advance(high - low)
    return Stored((read.folder / "encoded",), np.cumsum(sizes))


def _candidates(stream: PretrainData | FinetuneData, read: PortionRead, seed: int) -> np.ndarray:
    """Returns the rows that can be kept, as far as this portion alone tells. `prepare` tokenises what it keeps besides them."""
    found = [np.empty(0, np.int64)]
    parts = [one.part for one in named_sources(stream)]
    ends = np.cumsum([one.rows for one in read.segments]).tolist()
    for part in PARTS:
        own = [
            np.arange(end - one.rows, end)
            for one, end in zip(read.segments, ends, strict=True)
            if parts[one.source] == part
        ]
        numbers = np.concatenate([np.empty(0, np.int64), *own])
        numbers = numbers[read.rows.reasons[numbers] == 0]
        numbers = numbers[first_of_each(read.rows.keys[numbers]) == np.arange(len(numbers))]
        if part == "source" and stream.max_documents is not None:
            numbers = numbers[draw(read.rows.keys[numbers], stream.max_documents, seed)]
        found.append(numbers)
    return np.sort(np.concatenate(found))


@dataclass(frozen=True)
class _Chunk:
    """Rows that one process tokenises at once.

    Attributes:
        file: file for the result.
        rows: the rows.
        task: the task; None for the pretraining stream.
    """

    file: Path
    rows: RowPart
    task: Task | None

    def make(self, encoder: Encoder) -> None:
        """Tokenises the rows."""
        stored = [row.to_bytes() for row in encode(list(self.rows.items()), self.task, encoder)]
        self.file.write_bytes(b"".join(stored))
        np.save(self.file.with_suffix(".npy"), np.array(list(map(len, stored)), np.int64))

    def append_to(self, file: IO[bytes]) -> np.ndarray:
        """Moves the result to the end of a file. Returns the number of bytes of each row."""
        sizes: np.ndarray = np.load(self.file.with_suffix(".npy"))
        with self.file.open("rb") as mine:
            shutil.copyfileobj(mine, file, 1 << 20)
        self.file.unlink()
        self.file.with_suffix(".npy").unlink()
        return sizes
