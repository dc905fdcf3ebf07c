"""Sentences about invalid values: what pydantic found, in the words of all other messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

VALID_TEXTS: dict[str, str] = {}
"""What is valid for each regular expression of a text: the end of a sentence that begins with "must"."""

_MUST = {
    "bool_parsing": "be true or false",
    "bool_type": "be true or false",
    "dict_type": "be a section with options",
    "finite_number": "be a finite number",
    "float_parsing": "be a number",
    "float_type": "be a number",
    "greater_than": "be above {gt}",
    "greater_than_equal": "be at least {ge}",
    "int_from_float": "be a whole number",
    "int_parsing": "be a whole number",
    "int_parsing_size": "be a whole number of usual size",
    "int_type": "be a whole number",
    "less_than": "be below {lt}",
    "less_than_equal": "be at most {le}",
    "list_type": "be a list",
    "literal_error": "be {expected}",
    "model_attributes_type": "be a section with options",
    "model_type": "be a section with options",
    "string_too_long": "have at most {max_length} characters",
    "string_too_short": "have at least {min_length} characters",
    "string_type": "be a text",
    "too_long": "have at most {max_length} entries",
    "too_short": "have at least {min_length} entries",
}
"""The end of the sentence for each type of problem that pydantic distinguishes."""


def sentence(kind: str, message: str, context: Mapping[str, Any], found: Any) -> str:
    """Returns what is wrong with a value.

    Args:
        kind: pydantic's type of the problem.
        message: pydantic's own message.
        context: the bounds that pydantic compared with.
    """
    if kind == "missing":
        return "is required and was not given"
    if kind in ("json_invalid", "credentials", "rule"):
        return message
    if kind == "string_pattern_mismatch":
        told = f"must {VALID_TEXTS[context['pattern']]}"
    elif kind in _MUST:
        told = f"must {_must(kind, context)}"
    else:
        told = message.removeprefix("Value error, ")
        told = f"{told[0].lower()}{told[1:]}"
    return f"{told}, found {shown(found)}"


def of_alternatives(items: Sequence[Mapping[str, Any]], depth: int) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Yields place and sentence of the problems of a value that fits none of several types.

    Pydantic tells the problems with each type, at a place that contains the type's name. Where it looked into the value, as
    into the entries of a list, only what it found there is told.

    Args:
        items: the problems of this value.
        depth: length of the value's own place.
    """
    deepest = max(len(item["loc"]) for item in items)
    if deepest > depth + 1:
        for item in items:
            if len(item["loc"]) == deepest:
                place = (*item["loc"][:depth], *item["loc"][depth + 1 :])
                yield place, sentence(item["type"], item["msg"], item.get("ctx", {}), item["input"])
        return
    ends = [_must(item["type"], item.get("ctx", {})).removeprefix("be ") for item in items if item["type"] in _MUST]
    yield items[0]["loc"][:depth], f"must be {' or '.join(dict.fromkeys(ends))}, found {shown(items[0]['input'])}"


def _must(kind: str, context: Mapping[str, Any]) -> str:
    bounds = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
    return _MUST[kind].format_map(bounds)


def shown(value: Any) -> str:
    """Returns a value as JSON, in at most 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError):  # it contains itself, or has keys that JSON does not have
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
