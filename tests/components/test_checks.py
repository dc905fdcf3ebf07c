"""What is found wrong with a base model before anything heavy starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.checks import find_problems, fingerprints
from mixtune.components.config import Config, load
from tests.components.shared.tiny import tiny_model, tiny_tokenizer


def config(base: str | Path) -> Config:
    stream: dict[str, Any] = {"source": "embedded"}
    return load(
        {"model": {"base": str(base)}, "data": {"pretrain": stream, "finetune": stream}, "pretrain": {"steps": 1}}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good model folder."""
    tiny_model().save(tmp_path / "model", tiny_tokenizer())
    return tmp_path / "model"


def test_a_good_folder_a_hub_name_and_scratch_are_good(folder: Path) -> None:
    for base in (folder, "scratch", "owner/name", "gpt2", "owner/name-1.5_b"):
        assert find_problems(config(base)) == []


@pytest.mark.parametrize(
    ("base", "words"),
    [("./nowhere", "no folder"), ("a/b/c", "neither"), ("embedded", "not a model"), ("what?", "neither")],
)
def test_what_names_no_model_is_refused(base: str, words: str) -> None:
    (problem,) = find_problems(config(base))
    assert problem.startswith("model.base:")
    assert words in problem


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "no folder" in find_problems(config(tmp_path / "file"))[0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "cannot be read as JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "no .safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "can run code"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(folder: Path, spoil: Any, words: str) -> None:
    spoil(folder)
    (problem,) = find_problems(config(folder))
    assert words in problem


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"vocab_size": 10}))
    (problem,) = find_problems(config(folder))
    assert "61 entries" in problem
    assert "only 10" in problem


def test_a_model_with_too_few_positions_is_refused(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 100}))
    (problem,) = find_problems(config(folder))
    assert "only 100 positions" in problem


def test_changed_weights_change_the_fingerprint(folder: Path) -> None:
    before = fingerprints(config(folder)).base
    assert fingerprints(config(folder)).base == before
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert fingerprints(config(folder)).base != before
