"""Checks the values of a record and converts them to the types that their roles need."""

from __future__ import annotations

import contextlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

SHOWN_CHARACTERS = 60
LARGEST_NUMBER = 3.4e38  # approximate maximum of float32, the type of stored targets

MISSING = frozenset({"None", "nan", "NaN", "NAN", "null", "NULL", "N/A", "n/a", "#N/A", "NA", "<NA>"})
"""Texts as which programs write a missing value. They are labels in no format, just as null, NaN and empty text."""
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class ReferenceAnswer:
    """An answer and its position in the context.

    Attributes:
        text: the answer without surrounding white space.
        start: index of its first character in the context.
    """

    text: str
    start: int


class InvalidValueError(Exception):
    """An invalid value. The message continues a sentence that starts with the column's name."""


def parse_text(value: Any, role: str) -> str:
    """Returns a text, or a label or group as text: stripped, and in the Unicode form NFC. These can also be numbers or
    booleans."""
    is_name = role in ("label", "group")
    if is_name and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and math.isnan(value):
            raise InvalidValueError(f"is NaN, not a {role}")
        if isinstance(value, float) and not value.is_integer():
            raise InvalidValueError(f"is {value}; a {role} is text or a whole number")
        return str(int(value))
    if is_name and isinstance(value, bool):
        return str(value).lower()
    if value is None:
        raise InvalidValueError("is empty")
    if isinstance(value, float) and math.isnan(value):
        raise InvalidValueError("is NaN, not text")
    if not isinstance(value, str):
        raise InvalidValueError(f"is {kind_of(value)}, not text")
    if not value.strip():
        raise InvalidValueError("is empty")
    if _SURROGATE.search(value):
        raise InvalidValueError("holds half of a surrogate pair, which is no character")
    if is_name:
        value = unicodedata.normalize("NFC", value.strip())
        if value in MISSING:
            raise InvalidValueError(
                f"is {value}, which stands for a missing value; remove the record, or give the "
                f"{'class' if role == 'label' else role} another name"
            )
    return value


def parse_labels(value: Any) -> tuple[str, ...]:
    """Returns a list of labels from a list, from text that contains a JSON list, or from text separated by `;`."""
    if value is None:
        raise InvalidValueError("is empty; an empty list says that there is no label")
    if isinstance(value, float) and math.isnan(value):
        raise InvalidValueError("is NaN, not a list of labels")
    if isinstance(value, str):
        parsed = parse_json(value)
        if isinstance(parsed, str) and parsed.lstrip().startswith("["):
            # Text such as ['red', 'green'], which pandas writes, would become one class of this name.
            raise InvalidValueError(
                f'is {_quote(value)}, which starts as a list but is no JSON; write it as ["red", "green"], or red;green'
            )
        value = parsed if isinstance(parsed, list) else [part for part in value.split(";") if part.strip()]
    if not isinstance(value, list):
        raise InvalidValueError(f"is {kind_of(value)}, not a list of labels")
    labels = set()
    for item in value:
        try:
            labels.add(parse_text(item, "label"))
        except InvalidValueError as problem:
            raise InvalidValueError(f"holds a label that {problem}") from None
    return tuple(sorted(labels))


def parse_number(value: Any, untyped: bool) -> float:
    """Returns a number that is finite in float32."""
    if value is None or (untyped and not value.strip()):
        raise InvalidValueError("is empty")
    allowed = (str,) if untyped else (int, float, Decimal)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise InvalidValueError(f"is {kind_of(value)}, not a number")
    spelled = value.replace("_", "?") if isinstance(value, str) else value  # float() would accept 1_000
    try:
        number = float(spelled)
    except ValueError:
        raise InvalidValueError(f"is {_quote(str(value))}, not a number") from None
    except OverflowError:
        number = math.inf
    if math.isnan(number):
        raise InvalidValueError("is NaN, not a number")
    if abs(number) > LARGEST_NUMBER:
        raise InvalidValueError(f"is {number:g}; a number must be finite and at most {LARGEST_NUMBER:g}")
    return number


def parse_answers(value: Any, untyped: bool) -> list[tuple[str, int | None]]:
    """Returns answers from text, a list of texts or a SQuAD-style object, each with its start index if it is given."""
    if untyped:
        value = parse_json(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    texts, starts = value, None
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list):
            raise InvalidValueError(
                "is an object without the list text; give text, and with it answer_start if you can"
            )
        if starts is not None and not (isinstance(starts, list) and len(starts) == len(texts)):
            raise InvalidValueError(f"has {len(texts)} in text, and answer_start is not a list of as many")
    elif isinstance(value, str):
        texts = [value]
    elif isinstance(value, float) and math.isnan(value):
        raise InvalidValueError("is NaN, not an answer")
    elif not isinstance(value, list):
        raise InvalidValueError(
            f"is {kind_of(value)}, not text, a list of texts or an object with text and answer_start"
        )
    answers: list[tuple[str, int | None]] = []
    for text, start in zip(texts, starts if starts is not None else [None] * len(texts), strict=True):
        try:
            text = parse_text(text, "answer")
        except InvalidValueError as problem:
            raise InvalidValueError(f"holds an answer that {problem}") from None
        if starts is None:
            answers.append((text.strip(), None))
        elif isinstance(start, int) and not isinstance(start, bool):
            answers.append((text.strip(), start + len(text) - len(text.lstrip())))
        else:
            raise InvalidValueError("has an answer_start that is no whole number")
    return answers


def locate_answers(answers: Iterable[tuple[str, int | None]], context: str) -> tuple[ReferenceAnswer, ...]:
    """Locates each answer in the context. Without a start index, the first occurrence is used."""
    located = []
    for text, given in answers:
        start = context.find(text) if given is None else given
        if given is None and start < 0:
            raise InvalidValueError(f"holds {_quote(text)}, which does not stand in the context")
        if start < 0 or not context.startswith(text, start):
            there = _quote(context[start : start + len(text)]) if 0 <= start < len(context) else "nothing"
            raise InvalidValueError(f"holds {_quote(text)} at character {start} of the context, where {there} stands")
        located.append(ReferenceAnswer(text, start))
    return tuple(dict.fromkeys(located))


def meets(value: Any, asked: Any, untyped: bool) -> bool:
    """Tells whether a value meets a condition.

    Args:
        value: value of a record; null meets no condition.
        asked: a value, a list of accepted values, or a range with `min` and `max`.
        untyped: whether the value is text, as in CSV, that can represent a number or a boolean.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    if hasattr(asked, "min"):
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            return False
        return (asked.min is None or number >= asked.min) and (asked.max is None or number <= asked.max)
    accepted = asked if isinstance(asked, list) else [asked]
    if untyped:
        return value.strip() in {str(one).lower() if isinstance(one, bool) else str(one) for one in accepted}
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted)


def parse_json(text: str) -> Any:
    """Parses text that is a JSON list or object; returns other text unchanged."""
    if text.lstrip().startswith(("[", "{")):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    return text


def _quote(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…")


def kind_of(value: Any) -> str:
    """Returns the name of a value's type, for messages."""
    kinds = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"of type {type(value).__name__}")
