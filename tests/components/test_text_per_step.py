"""What is said, before a training, of steps that read very little pretraining text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtune.components.config import Config, load
from mixtune.components.text_per_step import few_text_tokens
from mixtune.pipelines.cli.commands import check_and_show


def configuration(folder: Path, letters: int = 80, objective: str = "masked_lm", **mixed: Any) -> dict[str, Any]:
    """By default 16 examples of 20 tokens, and as much text."""
    file = folder / "labels.csv"
    file.write_text("text,label\n" + f"{'a' * letters},good\n" * 5, encoding="utf-8")
    return {
        "model": {"base": "scratch", "max_length": 64, "objective": objective},
        "data": {"pretrain": {"source": "embedded"}, "finetune": {"source": str(file)}},
        "pretrain": {"steps": 1},
        "mixed": {"batch_size": 16, "replay_share": 0.5, **mixed},
    }


def config(*given: Any, **options: Any) -> Config:
    return load(configuration(*given, **options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "a step reads about 320 tokens of pretraining text, of which 48 are masked and predicted"),
        ({"batch_size": 100}, None),
        ({"replay_share": 0.9}, None),
        ({"objective": "causal_lm"}, None),
        ({"objective": "causal_lm", "letters": 60}, "about 240 tokens of pretraining text; the gradient"),
        ({"letters": 4000}, "about 1,024 tokens of pretraining text, of which 154"),
        ({"lambdas": [0.0, 1.0]}, None),
        ({"lambdas": [0.0, 1.0], "forgetting_budgets": [0.1]}, "about 320 tokens"),
    ],
)
def test_few_predicted_tokens_are_said(tmp_path: Path, options: dict[str, Any], said: str | None) -> None:
    found = few_text_tokens(config(tmp_path, **options))
    assert (found is None) if said is None else found is not None and said in found


def test_examples_of_unknown_length_are_taken_to_be_long(tmp_path: Path) -> None:
    values = configuration(tmp_path)
    values["data"]["finetune"]["source"] = "hub:owner/name"
    assert "at most 1,024 tokens" in (few_text_tokens(load(values)) or "")
    values["mixed"]["batch_size"] = 32
    assert few_text_tokens(load(values)) is None


def test_check_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mixtune.yaml"
    file.write_text(yaml.safe_dump(configuration(tmp_path)), encoding="utf-8")
    check_and_show(file, [])
    assert "note: mixed.replay_share: a step reads about 320 tokens" in capsys.readouterr().out
