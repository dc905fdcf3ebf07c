"""How much held-out data an evaluation reads, from the size of the training and the needs of the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixtune.components.config import Fingerprints, load, parts
from mixtune.components.evaluation_size import auto_examples, auto_tokens, costly_watch, few_examples

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


@pytest.mark.parametrize(
    ("mixed", "metric", "expected"),
    [
        ({"steps": 10}, "accuracy", 10_000),
        ({"steps": 10}, "chrf", 1000),
        ({"steps": 1000}, "chrf", 2000),  # 16,000 examples, and as much text; 15 % of 32,000 is 4,800
        ({"steps": 20_000}, "accuracy", 50_000),
        ({"epochs": 2}, "rouge_l", 1000),  # of five examples
    ],
)
def test_the_number_of_examples_follows_the_training_and_the_metric(
    tmp_path: Path, mixed: dict[str, Any], metric: str, expected: int
) -> None:
    values = configuration(tmp_path, letters=160, **mixed) | {"finetune": {"steps": 1_000_000}}
    if metric != "accuracy":
        (tmp_path / "answers.jsonl").write_text(
            5 * ('{"prompt": "' + "p" * 80 + '", "completion": "' + "c" * 80 + '"}\n')
        )
        values["data"]["finetune"] = {"source": str(tmp_path / "answers.jsonl"), "task": "generation"}
        values["model"]["objective"] = "causal_lm"
    assert auto_examples(load(values | {"evaluate": {"metric": metric}})) == expected


@pytest.mark.parametrize(("given", "expected"), [("auto", 7), (123, 123), (None, None)])
def test_what_the_step_is_given(tmp_path: Path, given: str | int | None, expected: int | None) -> None:
    for name in ("max_tokens", "max_examples"):
        config = load(configuration(tmp_path) | {"evaluate": {name: given}})
        assert getattr(parts(config, Fingerprints("a", "b", "c"), None, 7, 7).evaluate, name) == expected


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (
            1200,
            {},
            "one of 4, meets the margin of 0.02 with a chance of about 2% (if",
        ),
        (1200, {"gate": {"max_score_drop": 0.2}}, None),
        (
            1200,
            {"mixed": {"lambdas": [0.1]}, "evaluate": {"interpolation_alphas": []}},
            "about 3,925 are needed for 80%",
        ),
        (56_000, {}, None),
        (30_000, {"max_documents": 500}, "about 50 examples"),
        (1200, {"evaluate": {"metric": "macro_f1"}}, None),
        (56_000, {"evaluate": {"max_examples": 800}}, "at most 800 examples"),
        (56_000, {"evaluate": {"max_examples": 800}}, "raise evaluate.max_examples, or accept a larger margin"),
        (1200, {"evaluate": {"max_examples": 800}}, "give more examples, or accept a larger margin"),
    ],
)
def test_too_few_examples_for_the_gate_are_said_before_training(
    tmp_path: Path, rows: int, options: dict[str, Any], said: str | None
) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("text,label\n" + "a text,good\n" * rows)
    labelled = {"source": str(file), "dev_fraction": 0.1, "max_documents": options.pop("max_documents", None)}
    values = {"model": {"base": "scratch"}, "data": {"pretrain": {"source": "embedded"}, "finetune": labelled}}
    found = few_examples(load({**values, "pretrain": {"steps": 1}, **options}))
    assert (found is None) if said is None else found is not None and said in found


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
