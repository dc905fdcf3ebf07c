"""Reads the sources of a stream in portions, and puts what was read together as if it had been read at once.

A portion is some consecutive files of the stream's sources. It stands in a folder:

    rows            the rows, see `rows.py`
    *.npy           one array of `Rows` in each
    encoded         what the tokenizer made of the rows, if that has been done
    quarantine.jsonl  records that were left out, if there are any
    portion.json    everything else
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..shared.artifacts import read_json, write_json
from ..shared.config import EMBEDDED
from ..shared.data.locating import FileRange
from ..shared.data.prepared import QUARANTINE
from ..shared.data.problems import Problems, Skipped
from ..shared.data.sources import named_sources, read
from ..shared.data.tallies import Part, Tallies
from ..shared.errors import RefusedError
from .config import FinetuneData, PretrainData
from .long_texts import MAX_EXAMPLE_CHARACTERS
from .rows import Rows, RowWriter, texts_of
from .splitting import exact, fold
from .stored import Stored
from .text_filters import TextFilter

TOO_LARGE = (
    "has {:.1f} million characters; an example or a chat can have "
    f"{MAX_EXAMPLE_CHARACTERS / 1_000_000:g} million. Shorten it, or leave it out"
)
PORTION = "portion.json"
SMALL_BYTES = 4096


@dataclass(frozen=True)
class SourceSegment:
    """Files of one source.

    Attributes:
        source: number of the source in `named_sources`.
        files: the files; None is all of the source.
    """

    source: int
    files: FileRange | None = None


@dataclass(frozen=True)
class Portion:
    """Which part of a stream's sources is read together.

    Attributes:
        number: number of the portion, from 1.
        of: number of portions of the stream.
        segments: the files.
    """

    number: int
    of: int
    segments: tuple[SourceSegment, ...]

    @classmethod
    def whole(cls, stream: PretrainData | FinetuneData) -> Portion:
        """Returns the portion that is the whole stream."""
        return cls(1, 1, tuple(SourceSegment(source) for source in range(len(named_sources(stream)))))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Portion:
        """Returns the portion of which `value` has the fields."""
        segments = [
            SourceSegment(one["source"], FileRange(**one["files"]) if one["files"] else None)
            for one in value["segments"]
        ]
        return cls(value["number"], value["of"], tuple(segments))


@dataclass(frozen=True)
class SegmentRead:
    """What came of reading a segment.

    Attributes:
        source: number of the source.
        rows: number of rows.
        skipped: number of records that were left out.
        problems: problems, in order.
        tallies: counts of what was lost or changed.
    """

    source: int
    rows: int
    skipped: int
    problems: Problems
    tallies: Tallies


@dataclass(frozen=True)
class PortionRead:
    """A portion that was read.

    Attributes:
        portion: the portion.
        folder: its folder.
        rows: its rows.
        segments: its segments.
    """

    portion: Portion
    folder: Path
    rows: Rows
    segments: tuple[SegmentRead, ...]

    def save(self) -> None:
        """Writes to the folder what does not stand there yet."""
        rows = self.rows
        for name, array in _arrays(rows).items():
            np.save(self.folder / f"{name}.npy", array, allow_pickle=False)
        segments = [
            {**vars(one), "problems": one.problems.to_json(), "tallies": one.tallies.to_json()} for one in self.segments
        ]
        names = {"source_names": rows.source_names, "label_sets": rows.label_sets, "num_chats": rows.num_chats}
        write_json(self.folder / PORTION, {"portion": asdict(self.portion), "segments": segments, **names})

    @classmethod
    def load(cls, folder: Path) -> PortionRead:
        """Reads the folder of a portion.

        Raises:
            RefusedError: if it holds none.
        """
        known = read_json(folder / PORTION, "a portion of a stream that `prepare` read")

        def array(name: str) -> Any:
            file = folder / f"{name}.npy"
            if not file.exists():
                return None
            # An array without elements cannot be mapped into memory.
            return np.load(file, mmap_mode="r" if file.stat().st_size > SMALL_BYTES else None, allow_pickle=False)

        encoded = array("encoded_ends")
        rows = Rows(
            lines=Stored((folder / "rows",), array("line_ends")),
            encoded=None if encoded is None else Stored((folder / "encoded",), encoded),
            source_names=known["source_names"],
            label_sets=[tuple(labels) for labels in known["label_sets"]],
            num_chats=known["num_chats"],
            **{name: array(name) for name in _ARRAYS},
        )
        segments = [
            SegmentRead(
                **{
                    **one,
                    "problems": Problems.from_json(one["problems"]),
                    "tallies": Tallies.from_json(one["tallies"]),
                }
            )
            for one in known["segments"]
        ]
        return cls(Portion.from_json(known["portion"]), folder, rows, tuple(segments))


_ARRAYS = ("keys", "units", "groups", "targets", "numbers", "answers", "sources", "labels", "reasons")


def _arrays(rows: Rows) -> dict[str, np.ndarray]:
    arrays = {name: getattr(rows, name) for name in _ARRAYS}
    arrays["line_ends"] = rows.lines.ends
    arrays["encoded_ends"] = None if rows.encoded is None else rows.encoded.ends
    return {name: array for name, array in arrays.items() if array is not None}


def read_portion(stream: PretrainData | FinetuneData, portion: Portion, folder: Path) -> PortionRead:
    """Reads a portion and writes its rows to a folder. Problems are collected, and told when all portions are joined."""
    folder.mkdir(parents=True, exist_ok=True)
    embedded = stream.source == EMBEDDED
    writer = RowWriter(folder / "rows", embedded)
    skipped = Skipped(folder / QUARANTINE) if stream.on_error == "skip" else None
    digest = exact if stream.exact_duplicates else fold
    kept = TextFilter(stream.min_characters, stream.max_characters, stream.max_repetition)
    sources, segments = named_sources(stream), []
    for segment in portion.segments:
        named = sources[segment.source]
        problems, tallies = Problems(skipped), Tallies(embedded)
        first, count = len(writer), skipped.count if skipped else 0
        for row in read(named.path, named.reading(stream, problems, tallies), segment.files):
            texts = texts_of(row)
            if (row.chat or isinstance(stream, FinetuneData)) and sum(map(len, texts)) > MAX_EXAMPLE_CHARACTERS:
                size = sum(map(len, texts)) / 1_000_000
                problems.add_detail(f"{row.where}: {TOO_LARGE.format(size)}", {})
                continue
            writer.append(row, digest(*texts), kept.reason("\n".join(texts)) if named.part == "source" else 0)
        left_out = skipped.count - count if skipped else 0
        segments.append(SegmentRead(segment.source, len(writer) - first, left_out, problems, tallies))
    return PortionRead(portion, folder, writer.finish(), tuple(segments))


def load_portions(folders: Sequence[Path]) -> list[PortionRead]:
    """Returns the portions of a stream from their folders, which may be in any order, in order.

    Raises:
        RefusedError: if one is missing.
    """
    found = sorted((PortionRead.load(folder) for folder in folders), key=lambda one: one.portion.number)
    if found and [one.portion.number for one in found] != list(range(1, found[0].portion.of + 1)):
        numbers = ", ".join(str(one.portion.number) for one in found)
        raise RefusedError(f"portions: must be all {found[0].portion.of} of the stream, found {numbers}")
    return found


def join(
    stream: PretrainData | FinetuneData, portions: Sequence[PortionRead], problems: Problems, tallies: Tallies
) -> tuple[Rows, dict[Part, np.ndarray]]:
    """Returns the rows of all portions, and the numbers of the rows of each source option.

    Args:
        portions: all portions of the stream, in order.
        problems: gets the problems of all portions.
        tallies: gets their counts.
    """
    ends, ranges = [0], dict[Part, tuple[int, int]]()
    if problems.skipped is not None:
        for portion in portions:
            problems.skipped.take(portion.folder / QUARANTINE, sum(one.skipped for one in portion.segments))
    for number, named in enumerate(named_sources(stream)):
        before, first = len(problems), ends[-1]
        own = [one for portion in portions for one in portion.segments if one.source == number]
        for segment in own:
            problems.take(segment.problems)
            tallies.merge(segment.tallies)
        count, skipped = sum(one.rows for one in own), sum(one.skipped for one in own)
        if not count and len(problems) == before:
            met = " that meet filter" if named.own is not None and named.own.filter else ""
            valid = " that are valid" if skipped else ""
            problems.add(f"{named.option}: {named.path} holds no records{met}{valid}")
        if problems.skipped is not None:
            tallies.add("quarantined", named.part, named.path, skipped, skipped + count)
        ends.append(first + count)
        ranges[named.part] = (ranges.get(named.part, (first, first))[0], ends[-1])
    rows = replace(_joined([portion.rows for portion in portions]), source_ends=np.array(ends[1:], np.int64))
    return rows, {part: np.arange(*found, dtype=np.int64) for part, found in ranges.items()}


def _joined(parts: Sequence[Rows]) -> Rows:
    """Returns the rows of all parts, in order."""
    if len(parts) == 1:
        return parts[0]
    arrays: dict[str, Any] = {}
    for name in _ARRAYS:
        found = [array for part in parts if (array := getattr(part, name)) is not None and len(array)]
        arrays[name] = np.concatenate(found) if found else getattr(parts[0], name)
    arrays["sources"], source_names = _renumbered([(part.sources, part.source_names) for part in parts])
    arrays["labels"], label_sets = _renumbered([(part.labels, part.label_sets) for part in parts])
    encoded = [part.encoded or Stored((), np.zeros(len(part), np.int64), ()) for part in parts]
    return Rows(
        lines=Stored.joined([part.lines for part in parts]),
        encoded=Stored.joined(encoded) if any(one.files for one in encoded) else None,
        source_names=source_names,
        label_sets=label_sets,
        num_chats=sum(part.num_chats for part in parts),
        **arrays,
    )


def _renumbered(parts: Sequence[tuple[np.ndarray, list[Any]]]) -> tuple[np.ndarray, list[Any]]:
    """Joins parts, each with numbers in a list of its own. Returns the numbers in one list, and that list."""
    places: dict[Any, int] = {}
    numbers = []
    for own, names in parts:
        place = np.array([places.setdefault(name, len(places)) for name in names], np.int32)
        numbers.append(place[own] if len(own) else np.empty(0, np.int32))
    return np.concatenate(numbers), list(places)
