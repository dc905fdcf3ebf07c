"""Selects the configured columns of records, independent of the file format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .chats import Chat, is_chat, parse_chat
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
CHAT_ROLES = ("messages", "conversations", "tools")
"""Roles of the columns of chats."""
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
        chat: the conversation whose text `values` hold, if it is one.
    """

    values: dict[str, str]
    where: str
    labels: tuple[str, ...] = ()
    number: float | None = None
    answers: tuple[ReferenceAnswer, ...] = ()
    chat: Chat | None = None


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
    given = columns
    for number, (record, where) in enumerate(records):
        if number == 0:
            columns = fitting(given, record, where)
        if "messages" in columns or is_chat(record.get(columns.get("prompt", ""))):
            yield from _chats_of(record, columns, where, "text" in given, problems)
            continue
        wrong = [
            f"{where}: has no {column}" for role, column in columns.items() if column not in record and role != "tools"
        ]
        texts: dict[str, str] = {}
        others: dict[str, Any] = {}
        for role, column in columns.items():
            if column not in record or role == "tools":
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


def fitting(columns: Mapping[str, str], there: Iterable[str], where: str, others: Iterable[str] = ()) -> dict[str, str]:
    """Recognises the format of a source by its columns.

    Args:
        columns: column name for each role, of all formats that can be read: the task's own roles; `messages`, and
            `conversations`, which stands for the same; `tools`, which is optional; and the group.
        there: names of the existing columns.
        where: file, for messages.
        others: further columns that must be there.

    Returns:
        The columns of the first format that is there: the task's own, else the messages.

    Raises:
        UnreadableError: if columns of every format are missing.
    """
    names = list(there)
    common = {role: columns[role] for role in (GROUP,) if role in columns}
    common |= {role: columns[role] for role in ("tools",) if columns.get(role) in names}
    own = {role: column for role, column in columns.items() if role not in (*CHAT_ROLES, GROUP)}
    messages = [{"messages": columns[role]} for role in CHAT_ROLES[:2] if columns.get(role) in names]
    formats = [own, *messages]
    chosen = next((one for one in formats if all(column in names for column in one.values())), own)
    missing = [column for column in [*chosen.values(), *common.values(), *others] if column not in names]
    if missing:
        raise missing_columns(where, missing, names)
    # The group comes last, as a column that describes the others.
    return chosen | common


def _chats_of(
    record: Mapping[str, Any], columns: Mapping[str, str], where: str, is_text: bool, problems: Problems
) -> Iterator[Row]:
    """Yields the row of a record with messages, if it is valid; in pretraining, the chat as one text."""
    missing = [column for role, column in columns.items() if column not in record and role != "tools"]
    try:
        if missing:
            raise InvalidValueError(f"has no {', '.join(missing)}")
        chat = parse_chat(record, columns)
        group = {role: _group(record[column], column) for role, column in columns.items() if role == GROUP}
    except InvalidValueError as problem:
        problems.add_detail(f"{where}: {problem}", record)
        return
    values = {"prompt": chat.prompt, "completion": chat.completion}
    yield Row(({"text": "\n\n".join(values.values())} if is_text else values) | group, where, chat=chat)


def _group(value: Any, column: str) -> str:
    try:
        return parse_text(value, GROUP)
    except InvalidValueError as problem:
        raise InvalidValueError(f"{column} {problem}") from None


def missing_columns(where: str, missing: Iterable[str], there: Iterable[Any]) -> UnreadableError:
    """Returns the error that lists the missing and the existing columns."""
    have = ", ".join(str(name) for name in there) or "none"
    return UnreadableError(f"{where} has no column {', '.join(missing)}; its columns are {have}")
