"""Selects the configured columns of records, independent of the file format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .problems import Problems, UnreadableError
from .values import (
    InvalidValueError,
    ReferenceAnswer,
    locate_answers,
    parse_answers,
    parse_labels,
    parse_number,
    parse_text,
)

GROUP = "group"
"""Role of the column that says which records belong together."""
Record = tuple[Mapping[str, Any], str]
"""The columns of one record, and its location for messages."""


@dataclass(frozen=True)
class Row:
    """One document or example.

    Attributes:
        values: its texts: `text`; `text` and `label`; `prompt` and `completion`; or `question` and `context`; with them `group`
            if there is a group column.
        where: file and line, for messages and records.
        labels: multi-label: its labels, sorted; can be empty.
        number: regression: the target.
        answers: question answering: answers without duplicates, in the order of the data; empty if unanswerable.
    """

    values: dict[str, str]
    where: str
    labels: tuple[str, ...] = ()
    number: float | None = None
    answers: tuple[ReferenceAnswer, ...] = ()


def rows_of(
    records: Iterable[Record], columns: Mapping[str, str], problems: Problems, untyped: bool = False
) -> Iterator[Row]:
    """Selects and checks the configured columns of the records.

    Args:
        records: records of a file.
        columns: column name for each role. The role determines the type of the value.
        problems: collects invalid rows, which are skipped.
        untyped: whether all values are text, as in CSV. Text can then represent a number or contain JSON.
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
                    others[role] = parse_labels(value)
                elif role == "number":
                    others[role] = parse_number(value, untyped)
                elif role == "answers":
                    answers = parse_answers(value, untyped)
                    # Without a valid context, only the context is reported.
                    others[role] = locate_answers(answers, texts["context"]) if "context" in texts else ()
                else:
                    texts[role] = parse_text(value, role)
            except InvalidValueError as problem:
                wrong.append(f"{where}: {column} {problem}")
        if wrong and problems.skipped is not None:
            wrong = ["; ".join(wrong)]
        for sentence in wrong:
            problems.add_detail(sentence, record)
        if not wrong:
            yield Row(texts, where, **others)


def missing_columns(where: str, missing: Iterable[str], there: Iterable[Any]) -> UnreadableError:
    """Returns the error that lists the missing and the existing columns."""
    have = ", ".join(str(name) for name in there) or "none"
    return UnreadableError(f"{where} has no column {', '.join(missing)}; its columns are {have}")
