"""Prompts that are made of several columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from string import Formatter
from typing import Any

from .problems import Problems
from .records import Record, missing_columns
from .values import InvalidValueError, parse_text


@dataclass(frozen=True)
class PromptTemplate:
    """A text with names of columns in braces.

    Attributes:
        text: the template; doubled braces stand for braces.
        column: name that the column with the prompt has.
    """

    text: str
    column: str

    @property
    def parts(self) -> list[tuple[str, str | None]]:
        """Returns pieces of text, each with the name of the column behind it; None behind the last one.

        Raises:
            ValueError: if a brace is not closed or if it holds more than a name; the message ends a sentence.
        """
        found: list[tuple[str, str | None]] = []
        try:
            pieces = list(Formatter().parse(self.text))
        except ValueError:
            raise ValueError("has a brace that is not closed; write {{ or }} for one that is text") from None
        for text, name, form, conversion in pieces:
            if name is not None and (not name.strip() or form or conversion):
                raise ValueError("must have the name of a column, and nothing else, in each pair of braces")
            found.append((text, name))
        if all(name is None for _, name in found):
            raise ValueError("has no column in braces, such as {question}")
        return found

    @property
    def names(self) -> list[str]:
        """Returns the names of the columns."""
        return list(dict.fromkeys(name for _, name in self.parts if name is not None))

    def filled(self, records: Iterator[Record], problems: Problems) -> Iterator[Record]:
        """Yields the records with the prompt as a column. Records without a value for a column are problems.

        Raises:
            UnreadableError: if the first record has no such column.
        """
        parts = self.parts
        for number, (record, where) in enumerate(records):
            missing = [name for name in self.names if name not in record]
            if missing and number == 0:
                raise missing_columns(where, missing, record)
            wrong = []
            values: dict[str, str] = {}
            for name in self.names:
                try:
                    values[name] = _text(record.get(name))
                except InvalidValueError as problem:
                    wrong.append(f"{where}: {name} {problem}")
            for sentence in wrong:
                problems.add_detail(sentence, dict(record))
            if not wrong:
                prompt = "".join(text + (values[name] if name is not None else "") for text, name in parts)
                yield {**record, self.column: prompt}, where


def _text(value: Any) -> str:
    """Returns a text, or a number as text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return str(value) if is_number else parse_text(value, "prompt")
