"""Cuts the files of a stream into portions, which several tasks read at the same time."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import groupby

from ..shared.data.locating import FileRange, file_sizes
from ..shared.data.sources import named_sources
from ..shared.running.context import Context
from .config import FinetuneData, PrepareStep, PretrainData
from .reading import Portion, SourceSegment
from .stream_tokenizer import stream_of


def run(config: PrepareStep, *, context: Context, workers: int) -> list[dict[str, str]]:
    """Returns for each portion the arguments of the task that reads it, see `portion.py`.

    Args:
        config: the stream.
        context: log.
        workers: maximum number of portions.
    """
    found = cut(stream_of(config), workers)
    context.say(f"{len(found)} {'portion' if len(found) == 1 else 'portions'} of {stream_of(config).shown}")
    return [{"config": config.to_json(), "portion": json.dumps(asdict(portion))} for portion in found]


def cut(stream: PretrainData | FinetuneData, workers: int) -> list[Portion]:
    """Cuts the files of a stream, in the order in which they are read, into portions of about the same number of bytes.

    A source that is no list of files is read by one task: the hub, the embedded text, a folder written by `save_to_disk`, and
    what cannot be listed, about which that task tells.

    Args:
        workers: maximum number of portions.
    """
    files: list[tuple[int, int | None, int]] = []  # source, file, bytes
    counts = {}
    for source, named in enumerate(named_sources(stream)):
        sizes = file_sizes(named.path, named.option)
        counts[source] = len(sizes or ())
        files += [(source, None, 0)] if sizes is None else [(source, file, size) for file, size in enumerate(sizes)]
    total, before = sum(size for *_, size in files), 0
    of_worker: dict[int, list[tuple[int, int | None]]] = {}
    for source, file, size in files:
        # By the middle of the file, so that a large one does not take its neighbours along.
        worker = min(workers - 1, (2 * before + size) * workers // (2 * total)) if total else 0
        of_worker.setdefault(worker, []).append((source, file))
        before += size
    portions = []
    for number, own in enumerate(of_worker.values(), start=1):
        segments = []
        for source, inside in groupby(own, key=lambda one: one[0]):
            numbers = [file for _, file in inside if file is not None]
            span = FileRange(numbers[0], numbers[-1] + 1, counts[source]) if numbers else None
            segments.append(SourceSegment(source, span))
        portions.append(Portion(number, len(of_worker), tuple(segments)))
    return portions
