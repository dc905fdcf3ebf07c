"""Reading records out of files, whatever their format, and collecting what is wrong with them."""

from __future__ import annotations

import csv
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from .errors import RefusedError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SHOWN_PROBLEMS = 20

_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_SURROGATE = re.compile("[\ud800-\udfff]")

Record = tuple[Mapping[str, Any], str]
"""The columns of one record, and where it stands."""


@dataclass(frozen=True)
class Row:
    """One document or example as read.

    Attributes:
        values: `text`; `text` and `label`; or `prompt` and `completion`.
        where: file and line, for messages and records.
    """

    values: dict[str, str]
    where: str


class Problems:
    """Collects what is wrong, so that all of it is reported at once."""

    def __init__(self) -> None:
        self._general: list[str] = []
        self._detailed: list[str] = []
        self._more = 0

    def __len__(self) -> int:
        return len(self._general) + len(self._detailed) + self._more

    def add(self, problem: str) -> None:
        """What is wrong with a whole source; always shown."""
        if problem not in self._general:
            self._general.append(problem)

    def add_detail(self, problem: str) -> None:
        """What is wrong with one record; shown while there is room."""
        if len(self._detailed) < SHOWN_PROBLEMS:
            self._detailed.append(problem)
        else:
            self._more += 1

    def sentences(self) -> list[str]:
        """The problems, general ones first, the last line saying how many more there are."""
        more = [f"and {self._more} more problems of records"] if self._more else []
        return self._general + self._detailed + more

    def raise_if_any(self) -> None:
        """Raises:
        RefusedError: with all problems, where there are any.
        """
        if self:
            raise RefusedError(*self.sentences())


@dataclass(frozen=True)
class File:
    """A file of a source, local or remote."""

    filesystem: AbstractFileSystem
    path: str
    shown: str
    """The name used in messages."""

    @property
    def format(self) -> str:
        """Its format, such as `.csv`."""
        return format_of(self.path)

    def open(self) -> IO[bytes]:
        """Its content, decompressed."""
        compressed = self.path.lower().split("?")[0].endswith(_COMPRESSIONS)
        return self.filesystem.open(self.path, "rb", compression="infer" if compressed else None)


def known_formats() -> str:
    """The endings of file names that can be read, for messages."""
    return f"{', '.join(_FORMATS)} (or these with .gz)"


def format_of(path: str) -> str:
    """The format that a file's name tells, such as `.csv`; empty where it is not known."""
    name = PurePosixPath(path.split("?")[0]).name.lower()
    suffix = PurePosixPath(name).suffix
    if suffix in _COMPRESSIONS:
        suffix = PurePosixPath(name.removesuffix(suffix)).suffix
        return suffix if suffix in _FORMATS and suffix != ".parquet" else ""
    return suffix if suffix in _FORMATS else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def read_file(
    file: File, columns: Mapping[str, str], option: str, problems: Problems, single: bool, first: int | None = None
) -> Iterator[Row]:
    """Reads one file; `first` stops after that many records, good or bad."""
    if file.format == ".txt" and set(columns) != {"text"}:
        problems.add(f"{option}: {file.shown} is plain text and has no columns {', '.join(columns.values())}")
        return
    try:
        if file.format == ".txt":
            # What the columns are called is of no matter here.
            yield from islice(_read_text(file, problems, single), first)
            return
        reader = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}.get(file.format, _read_json)
        yield from rows_of(islice(reader(file, columns, problems), first), columns, problems)
    except UnreadableError as error:
        problems.add(f"{option}: {error}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        problems.add(f"{option}: {file.shown} cannot be read ({first_line(error)})")


class UnreadableError(Exception):
    """Ends the reading of one file."""


def rows_of(records: Iterable[Record], columns: Mapping[str, str], problems: Problems) -> Iterator[Row]:
    """Takes the wanted columns out of the records and checks them."""
    for number, (record, where) in enumerate(records):
        missing = [column for column in columns.values() if column not in record]
        if missing and number == 0:
            raise missing_columns(where, missing, record)
        wrong = [f"{where}: has no {column}" for column in missing]
        values = {}
        for role, column in columns.items():
            if column in record:
                values[role], problem = _value(record[column], role)
                if problem:
                    wrong.append(f"{where}: {column} {problem}")
        for problem in wrong:
            problems.add_detail(problem)
        if not wrong:
            yield Row(values, where)


def missing_columns(where: str, missing: Iterable[str], there: Iterable[Any]) -> UnreadableError:
    """Says which columns are missing and which there are."""
    have = ", ".join(str(name) for name in there) or "none"
    return UnreadableError(f"{where} has no column {', '.join(missing)}; its columns are {have}")


def _value(value: Any, role: str) -> tuple[str, str | None]:
    """A value as text, and what is wrong with it."""
    if role == "label" and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and math.isnan(value):
            return "", "is NaN, not a label"
        if isinstance(value, float) and not value.is_integer():
            return "", f"is {value}; a label is text or a whole number"
        return str(int(value)), None
    if role == "label" and isinstance(value, bool):
        return str(value).lower(), None
    if value is None:
        return "", "is empty"
    if isinstance(value, float) and math.isnan(value):
        return "", "is NaN, not text"
    if not isinstance(value, str):
        return "", f"is {_kind(value)}, not text"
    if not value.strip():
        return "", "is empty"
    if _SURROGATE.search(value):
        return "", "holds half of a surrogate pair, which is no character"
    if role == "label":
        value = value.strip()
        if value.lower() == "nan":
            return "", "is NaN, not a label"
    return value, None


def _kind(value: Any) -> str:
    kinds = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


def _lines(file: File, problems: Problems) -> Iterator[tuple[int, str]]:
    """Numbered lines, with their ends. A byte order mark is passed over; what is not UTF-8 is a problem."""
    with file.open() as opened:
        for number, line in enumerate(opened, start=1):
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise UnreadableError(f"{file.shown} is UTF-16; save it as UTF-8")
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                problems.add_detail(
                    f"{file.shown}, line {number}: is not UTF-8 (byte 0x{line[error.start]:02x} at position "
                    f"{error.start + 1}); save the file as UTF-8"
                )
                yield number, line.decode("utf-8", errors="replace")


def _read_json(file: File, columns: Mapping[str, str], problems: Problems) -> Iterator[Record]:
    """JSON lines; a file ending in .json can also be one list."""
    lines = _lines(file, problems)
    for number, line in lines:
        if not line.strip():
            continue
        if file.format == ".json" and line.lstrip().startswith("["):
            yield from _read_json_list(file, line + "".join(rest for _, rest in lines), problems)
            return
        where = f"{file.shown}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            message = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
            place = f", character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            problems.add_detail(f"{where}{place}: is no JSON ({message})")
            continue
        if isinstance(record, dict):
            yield record, where
        else:
            problems.add_detail(f"{where}: is {_kind(record)}, not an object with named fields")


def _read_json_list(file: File, text: str, problems: Problems) -> Iterator[Record]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{file.shown} is no JSON ({first_line(error)})") from None
    for number, record in enumerate(records, start=1):
        if isinstance(record, dict):
            yield record, f"{file.shown}, item {number}"
        else:
            problems.add_detail(f"{file.shown}, item {number}: is {_kind(record)}, not an object with named fields")


def _read_csv(file: File, columns: Mapping[str, str], problems: Problems) -> Iterator[Record]:
    """Comma- or tab-separated records with a header; quoted fields can hold line ends."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if file.format == ".tsv" else ","
    reader = csv.reader((line for _, line in _lines(file, problems)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            where, line = f"{file.shown}, line {line}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = [field.strip() for field in fields]
                missing = [column for column in columns.values() if column not in header]
                if missing:
                    raise missing_columns(file.shown, missing, header)
                for column in columns.values():
                    if header.count(column) > 1:
                        raise UnreadableError(f"{file.shown} has {header.count(column)} columns named {column}")
            elif len(fields) != len(header):
                problems.add_detail(f"{where}: the number of fields is {len(fields)}, in the header {len(header)}")
            else:
                yield dict(zip(header, fields, strict=True)), where
    except csv.Error as error:
        problems.add_detail(f"{file.shown}, line {line}: is no valid {file.format[1:].upper()} ({error})")


def _read_parquet(file: File, columns: Mapping[str, str], problems: Problems) -> Iterator[Record]:
    import pyarrow as pa
    from pyarrow import parquet

    with file.open() as opened:
        try:
            table = parquet.ParquetFile(opened)
        except pa.ArrowException as error:
            raise UnreadableError(f"{file.shown} is no Parquet file ({first_line(error)})") from None
        there = table.schema_arrow.names
        missing = [column for column in columns.values() if column not in there]
        if missing:
            raise missing_columns(file.shown, missing, there)
        number = 0
        for batch in table.iter_batches(batch_size=1000, columns=list(columns.values())):
            for record in batch.to_pylist():
                number += 1
                yield record, f"{file.shown}, row {number}"


def _read_text(file: File, problems: Problems, single: bool) -> Iterator[Row]:
    """A document for each paragraph of a single file; each of several files is one document."""
    block: list[str] = []
    start = 1
    for number, line in _lines(file, problems):
        line = line.rstrip("\r\n")
        if line.strip() or not single:
            if not block:
                start = number
            block.append(line)
        elif block:
            yield Row({"text": "\n".join(block)}, f"{file.shown}, line {start}")
            block = []
    text = "\n".join(block).strip("\n")
    if text.strip():
        yield Row({"text": text}, f"{file.shown}, line {start}" if single else file.shown)
    elif not single:
        problems.add_detail(f"{file.shown}: is empty")
