"""Takes the wanted columns out of records, whatever they were read from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .problems import Problems, UnreadableError
from .values import Answer, InvalidValueError, locate_answers, parse_answers, parse_labels, parse_number, parse_text

Record = tuple[Mapping[str, Any], str]
"""The columns of one record, and where it stands."""


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
                    others[role] = parse_labels(value)
                elif role == "number":
                    others[role] = parse_number(value, untyped)
                elif role == "answers":
                    answers = parse_answers(value, untyped)
                    # Where the context is wrong, that is the problem to name.
                    others[role] = locate_answers(answers, texts["context"]) if "context" in texts else ()
                else:
                    texts[role] = parse_text(value, role)
            except InvalidValueError as problem:
                wrong.append(f"{where}: {column} {problem}")
        for sentence in wrong:
            problems.add_detail(sentence)
        if not wrong:
            yield Row(texts, where, **others)


def missing_columns(where: str, missing: Iterable[str], there: Iterable[Any]) -> UnreadableError:
    """Makes the error that says which columns are missing and which there are."""
    have = ", ".join(str(name) for name in there) or "none"
    return UnreadableError(f"{where} has no column {', '.join(missing)}; its columns are {have}")
