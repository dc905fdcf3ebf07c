"""Every invalid value of every option is told in words of our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from mixtune.components.config import Config, load
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.section import section_of

INVALID: tuple[Any, ...] = (
    None,
    "?",
    "",
    -1,
    3,
    0,
    1.5,
    1e300,
    10**30,
    True,
    [],
    ["?"],
    [-1],
    [1e9],
    {},
    {"?": 1},
    float("nan"),
)
PYDANTIC = ("nput should", "unable to", "valid ", "constrained", "literal[")


def options(kind: type[BaseModel], *above: str) -> Iterator[tuple[str, ...]]:
    for name, field in kind.model_fields.items():
        inner = section_of(field.annotation)
        yield (*above, name)
        if inner:
            yield from options(inner, *above, name)


def told(place: tuple[str, ...], value: Any) -> list[str]:
    for name in reversed(place):
        value = {name: value}
    try:
        load(value)
    except RefusedError as refused:
        return [one for one in refused.problems if one.startswith(".".join(place))]
    raise AssertionError("a configuration without data is invalid")


@pytest.mark.parametrize("place", options(Config), ids=".".join)
def test_no_sentence_is_pydantics(place: tuple[str, ...]) -> None:
    sentences = [sentence for value in INVALID for sentence in told(place, value)]
    assert sentences
    for sentence in sentences:
        assert not any(word in sentence for word in PYDANTIC), sentence


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        ("mixed.lambdas", [0.1, 1.5], "mixed.lambdas.1: must be at most 1, found 1.5"),
        ("mixed.replay_share", 0, "mixed.replay_share: must be above 0, found 0"),
        ("finetune.steps", 2.5, "finetune.steps: must be a whole number, found 2.5"),
        ("finetune.steps", "many", 'finetune.steps: must be a whole number, found "many"'),
        ("evaluate.max_tokens", 0, "evaluate.max_tokens: must be at least 1 or 'auto', found 0"),
        ("evaluate.interpolation_alphas", [0.5, 2], "evaluate.interpolation_alphas.1: must be below 1, found 2"),
        ("evaluate.interpolation_alphas", "all", "evaluate.interpolation_alphas: must be a list or 'auto', found \"all\""),
        ("mixed", 3, "mixed: must be a section with options, found 3"),
    ],
)  # fmt: skip
def test_bounds_and_types(place: str, value: Any, sentence: str) -> None:
    assert told(tuple(place.split(".")), value) == [sentence]
