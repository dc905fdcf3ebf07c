"""Weights that cannot be used: `check` reads their headers, and loading names what it alone can see."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtune.components.checks import find_problems
from mixtune.components.config import Config, load
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model.loading import load_model
from tests.components.stages import Stages

from .shared.tiny import ENCODERS, tiny_model, tiny_tokenizer

Tensors = dict[str, torch.Tensor]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def config(base: Path, steps: int = 1) -> Config:
    stream: dict[str, Any] = {"source": "embedded"}
    return load(
        {"model": {"base": str(base), "max_length": 64}, "data": {"pretrain": stream, "finetune": stream},
         "pretrain": {"steps": steps}}
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good model folder."""
    tiny_model().save(tmp_path / "model", tiny_tokenizer())
    return tmp_path / "model"


def cut(size: int) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes()[:size])


def change(what: Callable[[Tensors], object]) -> Callable[[Path], object]:
    """Writes the file anew after a change of its tensors."""

    def spoil(file: Path) -> None:
        tensors = load_file(file)
        what(tensors)
        save_file(tensors, file, {"format": "pt"})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.write_text(POINTER), "is a git-lfs pointer, not the weights; run `git lfs pull`"),
        (cut(5000), "bytes, but its header lists"),
        (cut(100), "is cut off within its header, after 100 bytes"),
        (cut(0), "is cut off within its header, after 0 bytes"),
        (lambda file: file.write_bytes(file.read_bytes() + b"more"), "bytes, but its header lists"),
        (lambda file: file.write_bytes(b"PK\3\4" * 500), "is no safetensors file"),
        (lambda file: file.write_bytes((4).to_bytes(8, "little") + b"{{{{"), "has a header that cannot be read"),
        (
            change(lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(70, 16)})),
            "model.embed_tokens.weight has the shape 70 x 16, but config.json asks for 61 x 16",
        ),
    ],
)
def test_check_names_the_file_and_what_is_wrong(folder: Path, spoil: Any, words: str) -> None:
    assert find_problems(config(folder)) == []
    file = folder / "model.safetensors"
    spoil(file)
    (problem,) = find_problems(config(folder))
    assert problem.startswith(f"model.base: {file}")
    assert words in problem


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda part: part.unlink(), "is missing, but model.safetensors.index.json names it"),
        (lambda part: part.write_text(POINTER), "is a git-lfs pointer"),
        (change(lambda tensors: tensors.pop(min(tensors))), "lacks the tensor"),
    ],
)
def test_each_part_of_the_weights_is_read(tmp_path: Path, spoil: Any, words: str) -> None:
    folder = tmp_path / "model"
    tiny_model().save(folder, tiny_tokenizer())
    (folder / "model.safetensors").unlink()
    tiny_model().lm.save_pretrained(folder, max_shard_size="10KB")
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    assert find_problems(config(folder)) == []
    spoil(parts[1])
    (problem,) = find_problems(config(folder))
    assert problem.startswith(f"model.base: {parts[1]} ")
    assert words in problem
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "cannot be read as an index" in find_problems(config(folder))[0]


def test_weights_of_another_name_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (problem,) = find_problems(config(folder))
    assert "has neither model.safetensors nor model.safetensors.index.json" in problem


@pytest.mark.parametrize("architecture", [*ENCODERS, "llama"])
def test_a_missing_language_model_head_is_found_before_anything_starts(tmp_path: Path, architecture: str) -> None:
    """Without further pretraining there would be no forgetting to measure."""
    model: Any = tiny_model(architecture).lm
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "backbone")
    for name in ("whole", "backbone"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    assert find_problems(config(tmp_path / "whole", steps=0)) == []
    (problem,) = find_problems(config(tmp_path / "backbone", steps=0))
    assert "has no trained language-model head" in problem
    assert find_problems(config(tmp_path / "backbone", steps=1)) == []
    assert load_model(tmp_path / "backbone").new_weights != []
    assert load_model(tmp_path / "whole").new_weights == []


def test_shapes_that_do_not_fit_are_named_at_load(folder: Path) -> None:
    change(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(9)}))(folder / "model.safetensors")
    with pytest.raises(
        RefusedError, match=r"model\.safetensors: model\.norm\.weight has the shape 9, but .* asks for 16"
    ):
        load_model(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_base_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    stages = Stages(tmp_path)
    tiny_model().save(tmp_path / "base", tiny_tokenizer())
    name = "model.layers.1.mlp.up_proj.weight"
    file = tmp_path / "base" / "model.safetensors"
    change(lambda tensors: tensors[name][2, :3].fill_(value))(file)
    with pytest.raises(RefusedError) as refused:
        stages.pretrain(base=str(tmp_path / "base"))
    assert str(refused.value) == (
        f"model.base: {file}: {name} has 3 values that are not finite; download the model again, or choose another"
    )


def test_headers_are_read_without_torch(folder: Path) -> None:
    code = f"""import sys
from mixtune.components.checks import find_problems
from mixtune.components.config import Config
config = Config.model_validate_json({config(folder).model_dump_json()!r})
assert find_problems(config) == []
print([name for name in ("torch", "transformers", "safetensors") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
