"""Reads the records of a file. Each format has its own reader."""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice

from ..errors import first_line
from .files import File, numbered_lines
from .problems import Problems, UnreadableError
from .records import Record, Row, missing_columns, rows_of
from .values import kind_of


def read_file(
    file: File, columns: Mapping[str, str], option: str, problems: Problems, single: bool, first: int | None = None
) -> Iterator[Row]:
    """Reads one file. `first` limits the number of records, valid or not."""
    if file.format == ".txt" and set(columns) != {"text"}:
        problems.add(f"{option}: {file.shown} is plain text and has no columns {', '.join(columns.values())}")
        return
    try:
        if file.format == ".txt":
            # Plain text has no columns, so their names do not matter.
            yield from islice(_read_text(file, problems, single), first)
            return
        reader = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}.get(file.format, _read_json)
        untyped = file.format in (".csv", ".tsv")
        yield from rows_of(islice(reader(file, columns, problems), first), columns, problems, untyped)
    except UnreadableError as error:
        problems.add(f"{option}: {error}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        problems.add(f"{option}: {file.shown} cannot be read ({first_line(error)})")


def _read_json(file: File, columns: Mapping[str, str], problems: Problems) -> Iterator[Record]:
    """Reads JSON lines; a .json file can also contain a single list."""
    lines = numbered_lines(file, problems)
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
            position = f", character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            problems.add_detail(f"{where}{position}: is no JSON ({message})")
            continue
        if isinstance(record, dict):
            yield record, where
        else:
            problems.add_detail(f"{where}: is {kind_of(record)}, not an object with named fields")


def _read_json_list(file: File, text: str, problems: Problems) -> Iterator[Record]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{file.shown} is no JSON ({first_line(error)})") from None
    for number, record in enumerate(records, start=1):
        if isinstance(record, dict):
            yield record, f"{file.shown}, item {number}"
        else:
            problems.add_detail(f"{file.shown}, item {number}: is {kind_of(record)}, not an object with named fields")


def _read_csv(file: File, columns: Mapping[str, str], problems: Problems) -> Iterator[Record]:
    """Reads comma- or tab-separated records with a header. Quoted fields can contain line breaks."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if file.format == ".tsv" else ","
    reader = csv.reader((line for _, line in numbered_lines(file, problems)), delimiter=delimiter, strict=True)
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
    """Yields one document per paragraph of a single file; of several files, each file is one document."""
    block: list[str] = []
    start = 1
    for number, line in numbered_lines(file, problems):
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
