"""Reading records out of files, whatever their format, and collecting what is wrong with them."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from ..errors import RefusedError, first_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SHOWN_PROBLEMS = 20
SHOWN_CHARACTERS = 60
LARGEST_NUMBER = 3.4e38  # of 32 bits, in which targets are kept

_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_SURROGATE = re.compile("[\ud800-\udfff]")

Record = tuple[Mapping[str, Any], str]
"""The columns of one record, and where it stands."""


@dataclass(frozen=True)
class Answer:
    """An answer as it stands in the context.

    Attributes:
        text: without white space around it.
        start: index of its first character in the context.
    """

    text: str
    start: int


@dataclass(frozen=True)
class Row:
    """One document or example as read.

    Attributes:
        values: its texts: `text`; `text` and `label`; `prompt` and `completion`; or `question` and `context`.
        where: file and line, for messages and records.
        labels: multi-label: its labels, sorted; there can be none.
        number: regression: what is to be predicted.
        answers: question answering: each once, in the order of the data; none where the context holds no answer.
    """

    values: dict[str, str]
    where: str
    labels: tuple[str, ...] = ()
    number: float | None = None
    answers: tuple[Answer, ...] = ()


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
        untyped = file.format in (".csv", ".tsv")
        yield from rows_of(islice(reader(file, columns, problems), first), columns, problems, untyped)
    except UnreadableError as error:
        problems.add(f"{option}: {error}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        problems.add(f"{option}: {file.shown} cannot be read ({first_line(error)})")


class UnreadableError(Exception):
    """Ends the reading of one file."""


def rows_of(
    records: Iterable[Record], columns: Mapping[str, str], problems: Problems, untyped: bool = False
) -> Iterator[Row]:
    """Takes the wanted columns out of the records and checks them.

    Args:
        records: what was read.
        columns: column of each role; the role says what its value must be.
        problems: receives what is wrong; rows that are wrong are left out.
        untyped: whether every value is text, as in CSV, so that text can stand for a number or hold JSON.
    """
    for number, (record, where) in enumerate(records):
        missing = [column for column in columns.values() if column not in record]
        if missing and number == 0:
            raise missing_columns(where, missing, record)
        wrong = [f"{where}: has no {column}" for column in missing]
        texts: dict[str, str] = {}
        others: dict[str, Any] = {}
        for role, column in columns.items():
            if column not in record:
                continue
            value = record[column]
            try:
                if role == "labels":
                    others[role] = _labels(value)
                elif role == "number":
                    others[role] = _number(value, untyped)
                elif role == "answers":
                    answers = _answers(value, untyped)
                    # Where the context is wrong, that is the problem to name.
                    others[role] = _placed(answers, texts["context"]) if "context" in texts else ()
                else:
                    texts[role] = _text(value, role)
            except _WrongError as problem:
                wrong.append(f"{where}: {column} {problem}")
        for sentence in wrong:
            problems.add_detail(sentence)
        if not wrong:
            yield Row(texts, where, **others)


def missing_columns(where: str, missing: Iterable[str], there: Iterable[Any]) -> UnreadableError:
    """Says which columns are missing and which there are."""
    have = ", ".join(str(name) for name in there) or "none"
    return UnreadableError(f"{where} has no column {', '.join(missing)}; its columns are {have}")


class _WrongError(Exception):
    """What is wrong with a value, to stand behind its column's name."""


def _text(value: Any, role: str) -> str:
    """A text, or a label, which can be a number or a truth value, as text."""
    if role == "label" and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and math.isnan(value):
            raise _WrongError("is NaN, not a label")
        if isinstance(value, float) and not value.is_integer():
            raise _WrongError(f"is {value}; a label is text or a whole number")
        return str(int(value))
    if role == "label" and isinstance(value, bool):
        return str(value).lower()
    if value is None:
        raise _WrongError("is empty")
    if isinstance(value, float) and math.isnan(value):
        raise _WrongError("is NaN, not text")
    if not isinstance(value, str):
        raise _WrongError(f"is {_kind(value)}, not text")
    if not value.strip():
        raise _WrongError("is empty")
    if _SURROGATE.search(value):
        raise _WrongError("holds half of a surrogate pair, which is no character")
    if role == "label":
        value = value.strip()
        if value.lower() == "nan":
            raise _WrongError("is NaN, not a label")
    return value


def _labels(value: Any) -> tuple[str, ...]:
    """Any number of labels: a list, text that is a JSON list, or text in which `;` separates them."""
    if value is None:
        raise _WrongError("is empty; an empty list says that there is no label")
    if isinstance(value, float) and math.isnan(value):
        raise _WrongError("is NaN, not a list of labels")
    if isinstance(value, str):
        parsed = _parsed(value)
        value = parsed if isinstance(parsed, list) else [part for part in value.split(";") if part.strip()]
    if not isinstance(value, list):
        raise _WrongError(f"is {_kind(value)}, not a list of labels")
    found = set()
    for item in value:
        try:
            found.add(_text(item, "label"))
        except _WrongError as problem:
            raise _WrongError(f"holds a label that {problem}") from None
    return tuple(sorted(found))


def _number(value: Any, untyped: bool) -> float:
    """A number, finite also in 32 bits."""
    if value is None or (untyped and not value.strip()):
        raise _WrongError("is empty")
    allowed = (str,) if untyped else (int, float, Decimal)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise _WrongError(f"is {_kind(value)}, not a number")
    spelled = value.replace("_", "?") if isinstance(value, str) else value  # Python would take 1_000
    try:
        number = float(spelled)
    except ValueError:
        raise _WrongError(f"is {_shown(str(value))}, not a number") from None
    except OverflowError:
        number = math.inf
    if math.isnan(number):
        raise _WrongError("is NaN, not a number")
    if abs(number) > LARGEST_NUMBER:
        raise _WrongError(f"is {number:g}; a number must be finite and at most {LARGEST_NUMBER:g}")
    return number


def _answers(value: Any, untyped: bool) -> list[tuple[str, int | None]]:
    """Answers, each with the index of its first character where that is given: text, a list of texts, or as in SQuAD."""
    if untyped:
        value = _parsed(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    texts, starts = value, None
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list):
            raise _WrongError("is an object without the list text; give text, and with it answer_start if you can")
        if starts is not None and not (isinstance(starts, list) and len(starts) == len(texts)):
            raise _WrongError(f"has {len(texts)} in text, and answer_start is not a list of as many")
    elif isinstance(value, str):
        texts = [value]
    elif isinstance(value, float) and math.isnan(value):
        raise _WrongError("is NaN, not an answer")
    elif not isinstance(value, list):
        raise _WrongError(f"is {_kind(value)}, not text, a list of texts or an object with text and answer_start")
    found: list[tuple[str, int | None]] = []
    for text, start in zip(texts, starts if starts is not None else [None] * len(texts), strict=True):
        try:
            text = _text(text, "answer")
        except _WrongError as problem:
            raise _WrongError(f"holds an answer that {problem}") from None
        if starts is None:
            found.append((text.strip(), None))
        elif isinstance(start, int) and not isinstance(start, bool):
            found.append((text.strip(), start + len(text) - len(text.lstrip())))
        else:
            raise _WrongError("has an answer_start that is no whole number")
    return found


def _placed(answers: Iterable[tuple[str, int | None]], context: str) -> tuple[Answer, ...]:
    """The answers, each where it stands in the context; where it is not said, the first place is taken."""
    found = []
    for text, given in answers:
        start = context.find(text) if given is None else given
        if given is None and start < 0:
            raise _WrongError(f"holds {_shown(text)}, which does not stand in the context")
        if start < 0 or not context.startswith(text, start):
            there = _shown(context[start : start + len(text)]) if 0 <= start < len(context) else "nothing"
            raise _WrongError(f"holds {_shown(text)} at character {start} of the context, where {there} stands")
        found.append(Answer(text, start))
    return tuple(dict.fromkeys(found))


def _parsed(text: str) -> Any:
    """What a text says that is a JSON list or object; any other text as it is."""
    if text.lstrip().startswith(("[", "{")):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    return text


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…")


def _kind(value: Any) -> str:
    kinds = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
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
