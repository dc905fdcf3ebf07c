"""When the weights of a model are sharded over processes. What sharded trainings compute is in `test_distributed.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from mixtune.components.finetune.config import Finetune
from mixtune.components.shared.checkpoints.keys import content_key
from mixtune.components.shared.model.device import loading_device, loads_as_stored
from mixtune.components.shared.model.loading import add_task_head, load_model
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.sharding import fits, to_float32

from .tiny import ARCHITECTURES, ENCODERS, tiny_model, tiny_tokenizer


def test_a_model_fits_where_its_training_takes_70_percent() -> None:
    trained, read = tiny_model(seed=0), tiny_model(seed=1).requires_grad_(False)
    count = sum(weight.numel() for weight in trained.parameters())
    needed = (16 + 4) * count
    assert fits([trained, read], round(needed / 0.69))
    assert not fits([trained, read], round(needed / 0.71))


def test_a_compiled_training_is_not_sharded() -> None:
    with pytest.raises(ValidationError, match="compile does not work with parallelism: fsdp"):
        Finetune(compile=True, parallelism="fsdp")


@pytest.mark.parametrize(
    ("options", "processes", "device"),
    [
        ({}, "1", "cuda"),
        ({}, "2", "cpu"),
        ({"parallelism": "fsdp"}, "2", "cpu"),
        ({"parallelism": "ddp"}, "2", "cuda"),
        ({"attention": "flash_attention_2"}, "2", "cuda"),
    ],
)
def test_models_that_may_be_sharded_are_loaded_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], processes: str, device: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr("mixtune.components.shared.model.device.pick_device", lambda: torch.device("cuda", 0))
    assert loading_device(Finetune(**options)).type == device


@pytest.mark.parametrize(("way", "expected"), [("auto", True), ("ddp", False), ("fsdp", True)])
def test_trainings_that_can_be_sharded_load_weights_as_they_are_stored(
    monkeypatch: pytest.MonkeyPatch, way: str, expected: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert loads_as_stored(Finetune.model_validate({"parallelism": way})) == expected
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not loads_as_stored(Finetune.model_validate({"parallelism": way}))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ENCODERS])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_loaded_as_they_are_stored(
    tmp_path: Path, architecture: str, stored: torch.dtype
) -> None:
    tiny_model(architecture).to(stored).save(tmp_path, tiny_tokenizer(ends=architecture in ENCODERS))
    model, wide = load_model(tmp_path, as_stored=True), load_model(tmp_path)
    assert {weight.dtype for weight in model.parameters()} == {stored}, "also after the checks, which convert them"
    assert model.position_offset == wide.position_offset
    assert content_key({}, [model]) == content_key({}, [wide]), "the checkpoints of one can be resumed by the other"
    add_task_head(model, "classification", ["a", "b"], 0)
    assert model.task is not None
    assert list(model.task.parameters())[-1].dtype == torch.float32, "heads are trained in float32"
    to_float32(model)
    add_task_head(wide, "classification", ["a", "b"], 0)
    for (name, found), wanted in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize(("kind", "expected"), [("llama", torch.bfloat16), ("gemma", torch.float32)])
def test_constants_of_a_model_are_not_rounded(tmp_path: Path, kind: str, expected: torch.dtype) -> None:
    """Gemma multiplies its embeddings by a constant, which transformers makes in the number format of the weights."""
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 12,
    }
    config = AutoConfig.for_model(kind, vocab_size=61, num_key_value_heads=2, **sizes)
    MixedModel(AutoModelForCausalLM.from_config(config)).to(torch.bfloat16).save(tmp_path, tiny_tokenizer())
    model = load_model(tmp_path, as_stored=True)
    assert next(model.parameters()).dtype == expected
    assert all(constant.dtype == torch.float32 for constant in model.buffers())


def test_weights_in_several_formats_are_converted(tmp_path: Path) -> None:
    model = tiny_model()
    model.lm.get_input_embeddings().to(torch.bfloat16)
    model.save(tmp_path, tiny_tokenizer())
    assert {weight.dtype for weight in load_model(tmp_path, as_stored=True).parameters()} == {torch.float32}
