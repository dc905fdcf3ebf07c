"""How much held-out text an evaluation reads, from the size of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixtune.components.config import Fingerprints, load, parts
from mixtune.components.evaluation_size import auto_tokens, costly_watch

from .test_text_per_step import configuration


def size(folder: Path, finetune: dict[str, Any] | None = None, **mixed: Any) -> int:
    values = configuration(folder, letters=160, **mixed)  # 40 tokens in each example
    return auto_tokens(load(values | {"finetune": finetune or {"steps": 1_000_000}}))


@pytest.mark.parametrize(
    ("mixed", "expected"),
    [
        ({"steps": 10}, 50_000),
        ({"steps": 600}, 100_000),  # 768,000 tokens, half of them text; 15 % of them is 115,200
        ({"steps": 600, "replay_share": 0.8}, 200_000),
        ({"max_tokens": 1_500_000}, 200_000),
        ({"steps": 10_000_000}, 500_000),
        ({"epochs": 2}, 50_000),  # of five examples
        ({"steps": 600, "batch_size": 160}, 500_000),
    ],
)
def test_the_size_follows_the_training(tmp_path: Path, mixed: dict[str, Any], expected: int) -> None:
    assert size(tmp_path, **mixed) == expected


def test_the_shorter_training_counts(tmp_path: Path) -> None:
    assert size(tmp_path, {"steps": 10}, steps=10_000_000) == 50_000


@pytest.mark.parametrize(("given", "expected"), [({}, 7), ({"max_tokens": 123}, 123), ({"max_tokens": None}, None)])
def test_what_the_step_is_given(tmp_path: Path, given: dict[str, Any], expected: int | None) -> None:
    config = load(configuration(tmp_path) | {"evaluate": given})
    assert parts(config, Fingerprints("a", "b", "c"), auto_tokens=7).evaluate.max_tokens == expected


@pytest.mark.parametrize(
    ("watch", "share"),
    [
        (
            {"every_steps": 20},
            "17%",
        ),  # 8,192 and 128 · 40 tokens forward, 32 · 40 tokens in each step forward and backward
        ({"every_steps": 40}, None),
        ({"every_steps": 20, "max_tokens": 100}, None),
        ({}, None),
    ],
)
def test_watching_that_costs_much_is_said(tmp_path: Path, watch: dict[str, Any], share: str | None) -> None:
    found = costly_watch(load(configuration(tmp_path, letters=160) | {"watch": watch}))
    assert (found is None) if share is None else found is not None and f"up to about {share} of a training" in found
