"""Reads the records of a file. Each format has its own reader."""

from __future__ import annotations

import csv
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any

from ..errors import first_line
from .files import File, numbered_lines
from .problems import Problems, UnreadableError
from .prompt_templates import PromptTemplate
from .records import CHAT_ROLES, Record, Row, fitting, missing_columns, rows_of
from .tallies import Part, Tallies
from .values import kind_of, meets

PEEKED_LINES = 1000
_LIST_OF_OBJECTS = re.compile(r"\[\s*(\{|$)")
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
"""A field in quotes with doubled quotes inside."""
LEAST_SWALLOWED = 3
"""Lines in a quoted field, as many as which seldom look like records by chance."""


@dataclass(frozen=True)
class Reading:
    """How the files of a source are read.

    Attributes:
        columns: column name for each role.
        option: full name of the option that names the source, for messages.
        tsv_quotes: whether fields of a .tsv file can be quoted.
        problems: collects problems.
        tallies: collects counts.
        part: `source`, `dev_source` or `test_source`.
        conditions: conditions that a record must meet, by column: a value, a list of values, or a range with `min` and `max`.
        split: split of a folder written by `save_to_disk`.
        template: how the prompt is made of other columns.
    """

    columns: Mapping[str, str]
    option: str
    tsv_quotes: bool
    problems: Problems
    tallies: Tallies
    part: Part = "source"
    conditions: Mapping[str, Any] = field(default_factory=dict)
    split: str | None = None
    template: PromptTemplate | None = None

    def wanted(self, there: Sequence[str], where: str) -> list[str]:
        """Returns the columns that are read.

        Args:
            there: the existing columns.
            where: file or data set, for messages.

        Raises:
            UnreadableError: if columns are missing.
        """
        inside = {name: column for name, (column, _) in self.fields.items() if name not in there and column in there}
        names = [*there, *inside]
        if self.template is None:
            columns = fitting(self.columns, names, where, self.conditions)
            wanted = [*columns.values(), *self.conditions]
        else:
            made = self.template.column
            columns = fitting(self.columns, [*names, made], where, [*self.conditions, *self.template.names])
            others = [column for column in columns.values() if column != made]
            wanted = [*self.template.names, *others, *self.conditions]
        return list(dict.fromkeys(inside.get(name, name) for name in wanted))

    @cached_property
    def fields(self) -> dict[str, tuple[str, str]]:
        """Returns column and key of each name that can be a field of an object, such as `translation.en`."""
        names = [*self.columns.values(), *self.conditions, *(self.template.names if self.template else ())]
        split = {name: name.partition(".") for name in names}
        return {name: (column, key) for name, (column, dot, key) in split.items() if dot}

    def kept(self, records: Iterable[Record], untyped: bool = False) -> Iterator[Record]:
        """Yields the records that meet the conditions, with their prompts if a template makes them; counts the others.

        Args:
            records: records of a file.
            untyped: whether all values are text, as in CSV.

        Raises:
            UnreadableError: if the first record has no such column.
        """
        records = self._with_fields(records) if self.fields else records
        met = self._met(records, untyped) if self.conditions else iter(records)
        yield from met if self.template is None else self.template.filled(met, self.problems)

    def _with_fields(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yields the records with the fields of objects as further columns."""
        for record, where in records:
            objects = {name: (record.get(column), key) for name, (column, key) in self.fields.items()}
            found = {
                name: value[key] for name, (value, key) in objects.items() if isinstance(value, dict) and key in value
            }
            yield {**found, **record}, where

    def _met(self, records: Iterable[Record], untyped: bool) -> Iterator[Record]:
        for number, (record, where) in enumerate(records):
            missing = [column for column in self.conditions if column not in record]
            if missing and number == 0:
                raise missing_columns(where, missing, record)
            is_met = all(meets(record.get(column), asked, untyped) for column, asked in self.conditions.items())
            self.tallies.add("filtered", self.part, where, not is_met)
            if is_met:
                yield record, where


def read_file(file: File, reading: Reading, single: bool, first: int | None = None) -> Iterator[Row]:
    """Reads one file.

    Args:
        single: whether it is the only file of its source.
        first: maximum number of records, valid or not.
    """
    columns, option, problems = reading.columns, reading.option, reading.problems
    own = {role: column for role, column in columns.items() if role not in CHAT_ROLES}
    if file.format == ".txt" and set(own) != {"text"}:
        problems.add(f"{option}: {file.shown} is plain text and has no columns {', '.join(own.values())}")
        return
    try:
        if file.format == ".txt":
            # Plain text has no columns, so their names do not matter.
            yield from islice(_read_text(file, problems, single), first)
            return
        reader = _READERS.get(file.format, _read_json)
        untyped = file.format in (".csv", ".tsv")
        yield from rows_of(reading.kept(islice(reader(file, reading), first), untyped), columns, problems, untyped)
    except UnreadableError as error:
        problems.add(f"{option}: {error}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        problems.add(f"{option}: {file.shown} cannot be read ({first_line(error)})")


def _read_json(file: File, reading: Reading) -> Iterator[Record]:
    """Reads JSON lines; a .json file can also contain a single list."""
    problems = reading.problems
    lines: Iterator[tuple[int, str]] = numbered_lines(file, problems)
    lines = chain(_checked_start(file, lines), lines)
    for number, line in lines:
        if not line.strip():
            continue
        if file.format == ".json" and line.lstrip().startswith("["):
            yield from _read_json_list(file, line + "".join(rest for _, rest in lines), problems)
            return
        where = f"{file.shown}, line {number}"
        try:
            record = json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            message = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
            position = f", character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
            problems.add_detail(f"{where}{position}: is no JSON ({message})", line)
            continue
        if isinstance(record, dict):
            yield record, where
        else:
            problems.add_detail(f"{where}: is {kind_of(record)}, not an object with named fields", record)


def _checked_start(file: File, lines: Iterator[tuple[int, str]]) -> list[tuple[int, str]]:
    """Reads the first line that is not blank, and more if it is no JSON. Returns all lines that it has read.

    Raises:
        UnreadableError: if the file is a list, or if an object spans lines.
    """
    taken: list[tuple[int, str]] = []
    for number, line in lines:
        taken.append((number, line))
        if line.strip():
            break
    else:
        return taken
    if _LIST_OF_OBJECTS.match(line.strip()) and file.format != ".json":
        raise UnreadableError(
            f"{file.shown} is a JSON list; write one object on each line, or let its name end in .json"
        )
    if line.lstrip().startswith("{") and not _is_json(line):
        more = list(islice(lines, PEEKED_LINES))
        if _is_json(line + "".join(rest for _, rest in more), whole=False):
            either = " or a list of objects" if file.format == ".json" else ""
            raise UnreadableError(
                f"{file.shown}, line {number}: an object spans several lines; write one object on each line{either}"
            )
        taken += more
    return taken


def _is_json(text: str, whole: bool = True) -> bool:
    """Tells whether a text, or only its beginning, is JSON."""
    try:
        json.loads(text) if whole else json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return False
    return True


def _read_json_list(file: File, text: str, problems: Problems) -> Iterator[Record]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{file.shown} is no JSON ({first_line(error)})") from None
    for number, record in enumerate(records, start=1):
        if isinstance(record, dict):
            yield record, f"{file.shown}, item {number}"
        else:
            problem = f"{file.shown}, item {number}: is {kind_of(record)}, not an object with named fields"
            problems.add_detail(problem, record)


def _read_csv(file: File, reading: Reading) -> Iterator[Record]:
    """Reads comma- or tab-separated records with a header.

    Quoted fields can contain line breaks. In a .tsv file, a quotation mark is a character like any other, unless
    `tsv_quotes` is set.
    """
    csv.field_size_limit(2**31 - 1)
    problems = reading.problems
    tabs = file.format == ".tsv"
    quoted = not tabs or reading.tsv_quotes
    options: dict[str, Any] = {
        "delimiter": "\t" if tabs else ",",
        "quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    }
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for _, line in numbered_lines(file, problems):
            taken.append(line)
            yield line

    reader = csv.reader(lines(), strict=True, **options)
    header: list[str] | None = None
    line, records, spanning, swallowed, longest, quoted_like = 1, 0, 0, 0, (0, 0), 0
    try:
        for fields in reader:
            where, first, line = f"{file.shown}, line {line}", line, reader.line_num + 1
            inside, size = taken[1:-1], len(taken)
            taken.clear()
            if not fields:
                continue
            if header is None:
                header = [field.strip() for field in fields]
                for column in reading.wanted(header, file.shown):
                    if header.count(column) > 1:
                        raise UnreadableError(f"{file.shown} has {header.count(column)} columns named {column}")
                continue
            records += 1
            quoted_like += not quoted and any(_QUOTED.fullmatch(field) for field in fields)
            if size > 1:
                spanning, longest = spanning + 1, max(longest, (size, -first))
                if _look_like_records(inside, len(header), options):
                    swallowed += len(inside)
            if len(fields) != len(header):
                problem = f"{where}: the number of fields is {len(fields)}, in the header {len(header)}"
                problems.add_detail(problem, fields)
            else:
                yield dict(zip(header, fields, strict=True)), where
    except csv.Error as error:
        problem = f"{file.shown}, line {line}: is no valid {file.format[1:].upper()} ({error})"
        problems.add_detail(problem, "", skippable=False)
    if quoted:
        place = f"such as the {longest[0]} lines from {file.shown}, line {-longest[1]}" if spanning else ""
        reading.tallies.add("several_lines", reading.part, file.shown, spanning, records, place)
        reading.tallies.add("swallowed_lines", reading.part, file.shown, swallowed, reader.line_num, place)
    else:
        reading.tallies.add("quoted_like", reading.part, file.shown, quoted_like, records)


def _look_like_records(lines: Sequence[str], num_fields: int, options: Mapping[str, Any]) -> bool:
    """Tells whether each of several lines in a quoted field has as many fields as the header: a quote may not be closed."""
    return len(lines) >= LEAST_SWALLOWED and all(
        len(fields) == num_fields for line in lines for fields in csv.reader([line], **options)
    )


def _read_parquet(file: File, reading: Reading) -> Iterator[Record]:
    import pyarrow as pa
    from pyarrow import parquet

    with file.open() as opened:
        try:
            table = parquet.ParquetFile(opened)
        except pa.ArrowException as error:
            raise UnreadableError(f"{file.shown} is no Parquet file ({first_line(error)})") from None
        wanted = reading.wanted(table.schema_arrow.names, file.shown)
        batches = table.iter_batches(batch_size=1000, columns=wanted)
        yield from _records_of(file, (batch.to_pylist() for batch in batches))


def _read_arrow(file: File, reading: Reading) -> Iterator[Record]:
    """Reads an Arrow file in either of its formats, as `datasets` and others write it."""
    import pyarrow as pa

    with file.open() as opened:
        try:
            is_file = opened.read(6) == b"ARROW1"
            opened.seek(0)
            table = pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)
        except (pa.ArrowException, OSError) as error:
            raise UnreadableError(f"{file.shown} is no Arrow file ({first_line(error)})") from None
        wanted = reading.wanted(table.schema.names, file.shown)
        batches = map(table.get_batch, range(table.num_record_batches)) if is_file else iter(table)
        yield from _records_of(file, (batch.select(wanted).to_pylist() for batch in batches))


def _records_of(file: File, batches: Iterable[list[dict[str, Any]]]) -> Iterator[Record]:
    for number, record in enumerate(chain.from_iterable(batches), start=1):
        yield record, f"{file.shown}, row {number}"


_READERS: Mapping[str, Callable[[File, Reading], Iterator[Record]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
"""Readers of formats that are not JSON."""


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
        problems.add_detail(f"{file.shown}: is empty", "")
