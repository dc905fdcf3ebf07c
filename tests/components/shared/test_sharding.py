"""When the weights of a model are sharded over processes. What sharded trainings compute is in `test_distributed.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mixtune.components.finetune.config import Finetune
from mixtune.components.shared.model.device import loading_device, loads_as_stored
from mixtune.components.shared.model.loading import add_task_head, load_model
from mixtune.components.shared.model.sharding import fits

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


@pytest.mark.parametrize(("way", "expected"), [("auto", False), ("ddp", False), ("fsdp", True)])
def test_sharded_trainings_alone_load_weights_as_they_are_stored(
    monkeypatch: pytest.MonkeyPatch, way: str, expected: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert loads_as_stored(Finetune.model_validate({"parallelism": way})) == expected
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not loads_as_stored(Finetune.model_validate({"parallelism": way}))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ENCODERS])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_causal_models_in_bf16_are_loaded_as_they_are_stored(
    tmp_path: Path, architecture: str, stored: torch.dtype
) -> None:
    tiny_model(architecture).to(stored).save(tmp_path, tiny_tokenizer(ends=architecture in ENCODERS))
    model = load_model(tmp_path, as_stored=True)
    kept = architecture in ARCHITECTURES and stored == torch.bfloat16
    assert next(model.lm.parameters()).dtype == (stored if kept else torch.float32)
    add_task_head(model, "classification", ["a", "b"], 0)
    assert model.task is not None
    assert next(model.task.parameters()).dtype == torch.float32, "heads are trained in float32"
