"""Data sources: reads a `source`, checks it in advance and identifies its content.

A source is a file, a glob, a folder, an fsspec URL, a hub data set (`hub:owner/name`) or `embedded`. Problems are collected
in `Problems`, with file and line, and reported at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, Protocol

from ..config import EMBEDDED
from ..errors import RefusedError
from ..section import InvalidOptionError
from .claims import CLAIM, NOT_MOUNTED, mounted
from .data_sets import hub_commit, hub_name, is_hub, read_hub, read_saved, saved_folder
from .files import File
from .locating import FileRange, find_files, is_local, protocol_of, seen_from_here
from .problems import Problems, Skipped
from .prompt_templates import PromptTemplate
from .readers import Reading, read_file
from .records import CHAT_ROLES, GROUP, Row
from .source_names import PASSWORD_REFUSED, has_password
from .tallies import Part, Tallies

EMBEDDED_ROLES = {"text", "label", "prompt", "completion"}
NOT_EMBEDDED = (
    "embedded holds examples for classification and generation only; name a file, or choose one of these tasks"
)
CHECKED_FILES = 20
CHECKED_RECORDS = 5
COUNTED_BYTES = 1 << 30
"""Files with more bytes in all are not counted in a quick check."""

PARTS: tuple[Literal["source", "dev_source", "test_source"], ...] = ("source", "dev_source", "test_source")


# Attributes in which file systems report a checksum or version of a file's content.
_CHECKSUMS = ("ETag", "etag", "md5Hash", "checksum", "content_md5", "Content-MD5", "Digest")
_TIMES = ("Last-Modified", "LastModified", "last_modified", "mtime", "created", "updated")


class SourceOptions(Protocol):
    """The options of one of several sources. `DataSource` has them."""

    @property
    def path(self) -> str: ...
    @property
    def columns(self) -> dict[str, str]: ...
    @property
    def filter(self) -> Mapping[str, Any]: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...


class StreamOptions(Protocol):
    """The options of a stream that this module uses. `PretrainData` and `FinetuneData` have them."""

    section: ClassVar[str]

    @property
    def source(self) -> str | None: ...
    @property
    def sources(self) -> Sequence[SourceOptions]: ...
    @property
    def dev_source(self) -> str | None: ...
    @property
    def test_source(self) -> str | None: ...
    @property
    def on_error(self) -> Literal["fail", "skip"]: ...
    @property
    def tsv_quotes(self) -> bool: ...
    @property
    def columns(self) -> dict[str, str]: ...
    @property
    def column_options(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class NamedSource:
    """A source of a stream.

    Attributes:
        option: full name of the option, such as `data.pretrain.dev_source`.
        path: value of the option, with revision and split if it is a hub data set; of data in a mounted claim, its path.
        part: `source`, `dev_source` or `test_source`.
        own: its options if it is one of several sources.
        split: split of a folder written by `save_to_disk`.
    """

    option: str
    path: str
    part: Part
    own: SourceOptions | None = None
    split: str | None = None

    def reading(self, stream: StreamOptions, problems: Problems, tallies: Tallies) -> Reading:
        """Returns how its files are read."""
        columns = stream.columns
        if self.own is not None:
            columns |= {
                role: self.own.columns[option]
                for role, option in {**stream.column_options, GROUP: "group_column"}.items()
                if role in columns and option in self.own.columns
            }
        conditions = self.own.filter if self.own is not None else {}
        text = getattr(stream, "prompt_template", None)
        template = PromptTemplate(text, columns["prompt"]) if text is not None else None
        return Reading(
            columns, self.option, stream.tsv_quotes, problems, tallies, self.part, conditions, self.split, template
        )


def named_sources(stream: StreamOptions) -> list[NamedSource]:
    """Returns the sources of a stream."""
    found = []
    for part in PARTS:
        # An option whose value is invalid is no attribute.
        path = getattr(stream, part, None)
        if path is not None:
            found.append(NamedSource(f"{stream.section}.{part}", mounted(path), part))
        if part == "source":
            for number, own in enumerate(getattr(stream, "sources", [])):
                path = mounted(own.path)
                if is_hub(path):
                    path += (f"@{own.revision}" if own.revision else "") + (f"#{own.split}" if own.split else "")
                option = f"{stream.section}.sources.{number}.path"
                found.append(NamedSource(option, path, part, own, own.split))
    return found


def read(source: str, reading: Reading, part: FileRange | None = None) -> Iterator[Row]:
    """Reads the documents or examples of a source, in a fixed order. Invalid rows are skipped.

    Args:
        source: value of the option.
        reading: how to read it, and what collects problems and counts.
        part: the files to read; None reads all.
    """
    option, problems = reading.option, reading.problems
    if source == EMBEDDED:
        yield from _read_embedded(reading.columns, option, problems)
    elif is_hub(source):
        yield from read_hub(source, reading)
    elif folder := saved_folder(source):
        yield from read_saved(folder, seen_from_here(source), reading)
    else:
        files = find_files(source, option, problems)
        part = part or FileRange(0, len(files), len(files))
        if len(files) != part.of:
            problems.add(f"{option}: {source} has other files than at the start of the run; start it again")
        for file in files[part.first : part.end]:
            rows, before = 0, len(problems)
            for row in read_file(file, reading, single=len(files) == 1):
                rows += 1
                yield row
            if not rows and len(problems) == before and not reading.conditions and not problems.skipped:
                problems.add(f"{option}: {file.shown} holds no records")


def check_source(stream: StreamOptions) -> list[str]:
    """Returns problems of a stream's sources that a quick check finds: missing files, missing columns, invalid first records.

    Reads only local files, and only the first records of each.
    """
    problems = Problems(Skipped() if stream.on_error == "skip" else None)
    for named in named_sources(stream):
        # What a source must hold is unknown if the task or a column is invalid.
        with contextlib.suppress(InvalidOptionError):
            _check(stream, named, problems)
    return problems.sentences()


def _check(stream: StreamOptions, named: NamedSource, problems: Problems) -> None:
    option, source = named.option, named.path
    if source.startswith(CLAIM):
        problems.add(f"{option}: {source} {NOT_MOUNTED}")
    elif has_password(source):
        problems.add(f"{option}: {PASSWORD_REFUSED}")
    elif source == EMBEDDED:
        _check_embedded(stream.columns, option, problems)
    elif is_hub(source):
        hub_name(source, option, problems)
    elif folder := saved_folder(source):
        reading = named.reading(stream, problems, Tallies())
        list(islice(read_saved(folder, seen_from_here(source), reading), CHECKED_RECORDS))
    elif is_local(source, option, problems):
        files = find_files(source, option, problems)
        reading = named.reading(stream, problems, Tallies())
        for file in files[:CHECKED_FILES]:
            before = len(problems)
            records = read_file(file, reading, single=len(files) == 1, first=CHECKED_RECORDS)
            found = list(records) or reading.conditions or (problems.skipped and problems.skipped.count)
            if not found and len(problems) == before:
                problems.add(f"{option}: {file.shown} holds no records")


def first_rows(stream: StreamOptions, count: int) -> list[Row]:
    """Reads the first records of a stream's local files, about `count` of each source. Returns none from other sources."""
    problems, rows = Problems(Skipped()), list[Row]()
    for named in (one for one in named_sources(stream) if one.part == "source"):
        source = named.path
        if (
            source != EMBEDDED
            and not is_hub(source)
            and not saved_folder(source)
            and is_local(source, named.option, problems)
        ):
            files = find_files(source, named.option, problems)[:CHECKED_FILES]
            reading = named.reading(stream, problems, Tallies())
            for file in files:
                rows += read_file(file, reading, single=len(files) == 1, first=-(-count // len(files)))
    return rows


def fingerprint(stream: StreamOptions) -> str:
    """Returns 64 hexadecimal digits that identify the content of a stream's sources.

    Local files are identified by their content, remote files by metadata of their store (size, ETag or checksum, modification
    time), hub data sets by their commit (if the hub is reachable), the embedded data by the versions of Python and packages.

    Raises:
        RefusedError: if a source does not exist.
    """
    digest = hashlib.sha256()
    problems = Problems()
    for named in named_sources(stream):
        option, source = named.option, named.path
        digest.update(f"{option}\n".encode())
        if source == EMBEDDED:
            from . import embedded

            digest.update(json.dumps(embedded.versions(), sort_keys=True).encode())
        elif is_hub(source):
            digest.update(f"{source} {hub_commit(source, option, problems)}".encode())
        else:
            for file in find_files(source, option, problems):
                digest.update(f"{PurePosixPath(file.path).name} {_content(file)}\n".encode())
    problems.raise_if_any()
    return digest.hexdigest()


def local_files(source: str, option: str) -> list[Path]:
    """Returns the files of a source on this machine, sorted by name.

    Raises:
        RefusedError: if there is none, or if the format of a file is not known.
    """
    problems = Problems()
    files = find_files(source, option, problems)
    problems.raise_if_any()
    return [Path(file.path) for file in files]


def count_records(source: str, option: str) -> int | None:
    """Counts the records of local files without parsing them: lines, or the rows that Parquet files state.

    Returns:
        The number, or None if it cannot be counted quickly: remote, compressed or JSON files, or more than `COUNTED_BYTES`.
    """
    problems = Problems()
    if source == EMBEDDED or is_hub(source) or saved_folder(source) or not is_local(source, option, problems):
        return None
    files = find_files(source, option, problems)
    if len(problems) or sum(Path(file.path).stat().st_size for file in files) > COUNTED_BYTES:
        return None
    count = 0
    for file in files:
        path = Path(file.path)
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            count += ParquetFile(path).metadata.num_rows
        elif path.suffix in (".jsonl", ".ndjson", ".csv", ".tsv", ".txt"):
            with path.open("rb") as opened:
                count += sum(1 for line in opened if line.strip()) - (path.suffix in (".csv", ".tsv"))
        else:
            return None
    return count


def _content(file: File) -> str:
    if protocol_of(file.filesystem) == "file":
        with open(file.path, "rb") as opened:  # noqa: PTH123
            return hashlib.file_digest(opened, "sha256").hexdigest()
    info = file.filesystem.info(file.path)
    known = [f"{name}={info[name]}" for name in (*_CHECKSUMS, *_TIMES) if info.get(name)]
    return " ".join([f"size={info.get('size')}", *(known or [str(file.filesystem.ukey(file.path))])])


def _read_embedded(columns: Mapping[str, str], option: str, problems: Problems) -> Iterator[Row]:
    from . import embedded

    if not set(columns) - set(CHAT_ROLES) <= EMBEDDED_ROLES:
        problems.add(f"{option}: {NOT_EMBEDDED}")
    elif "label" in columns:
        for text, label, where in embedded.classification():
            yield Row({"text": text, "label": label}, where)
    elif "prompt" in columns:
        for prompt, completion, where in embedded.generation():
            yield Row({"prompt": prompt, "completion": completion}, where)
    else:
        for text, where in embedded.texts():
            yield Row({"text": text}, where)


def _check_embedded(columns: Mapping[str, str], option: str, problems: Problems) -> None:
    from . import embedded

    if not set(columns) - set(CHAT_ROLES) <= EMBEDDED_ROLES:
        problems.add(f"{option}: {NOT_EMBEDDED}")
    if not option.endswith(".source"):
        problems.add(f"{option}: embedded can stand in source only; leave {option} out and a share of it is held out")
    try:
        embedded.versions()
    except RefusedError as error:
        problems.add(f"{option}: {error.problems[0]}")
