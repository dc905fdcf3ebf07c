"""An adapter that is not merged: mixtune, transformers and peft load the same model from its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor

from mixtune.components.shared.config import Task
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model.adapters import has_adapter, is_adapted, save_adapted
from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import Segment, collate
from mixtune.components.shared.training.variant import TrainingVariant

from .tiny import ARCHITECTURES, ENCODERS, LABELS, tiny_model, tiny_tokenizer
from .trained import run, write_both

pytestmark = pytest.mark.numeric

TOKENS = (3, 4, 5, 6)


def adapter_of(folder: Path, architecture: str, task: Task) -> MixedModel:
    """Trains an adapter of a model in `base` and writes it to `adapter`."""
    tokenizer = tiny_tokenizer(ends=architecture in ENCODERS)
    tiny_model(architecture).save(folder / "base", tokenizer)
    model = load_model(folder / "base")
    model.add_head(task, LABELS.get(task), 0)
    variant = TrainingVariant(lora_rank=2, lora_merge=False)
    run(write_both(folder, task), task, architecture, variant=variant, steps=3, model=model)
    (folder / "adapter").mkdir()
    save_adapted(model, folder / "adapter", tokenizer, str(folder / "base"), None)
    return model


@torch.no_grad()
def outputs(model: MixedModel, tokens: Sequence[int] = TOKENS) -> Tensor:
    """Logits of a text, by the task head if there is one."""
    batch = collate([[Segment(np.array(tokens))]], 60, label_all=True)
    hidden = model.eval().hidden(batch)
    return model.lm_logits(hidden) if model.task is None else model.task_logits(hidden, batch)


@torch.no_grad()
def plain_outputs(auto: Any, folder: Path, **options: Any) -> Tensor:
    logits: Tensor = auto.from_pretrained(folder, **options).eval()(input_ids=torch.tensor([TOKENS])).logits
    return logits[0] if logits.dim() == 3 else logits


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ENCODERS])
def test_all_libraries_load_the_same_classifier(tmp_path: Path, architecture: str) -> None:
    trained = adapter_of(tmp_path, architecture, "classification")
    again = load_model(tmp_path / "adapter")
    assert is_adapted(trained)
    assert not is_adapted(again), "merged when it is loaded"
    wanted, count = outputs(trained), len(LABELS["classification"])
    torch.testing.assert_close(outputs(again), wanted, rtol=1e-4, atol=1e-4)
    of_transformers = plain_outputs(transformers.AutoModelForSequenceClassification, tmp_path / "adapter")
    torch.testing.assert_close(of_transformers, wanted, rtol=1e-4, atol=1e-4)
    of_peft = plain_outputs(peft.AutoPeftModelForSequenceClassification, tmp_path / "adapter", num_labels=count)
    torch.testing.assert_close(of_peft, wanted, rtol=1e-4, atol=1e-4)
    assert all(bool(weight.any()) for name, weight in trained.named_parameters() if "lora_" in name), "it counts"


def test_all_libraries_load_the_same_language_model(tmp_path: Path) -> None:
    wanted = outputs(adapter_of(tmp_path, "llama", "generation"))
    (tmp_path / "adapter").rename(tmp_path / "elsewhere")
    torch.testing.assert_close(outputs(load_model(tmp_path / "elsewhere")), wanted, rtol=1e-4, atol=1e-4)
    for auto in (transformers.AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
        torch.testing.assert_close(plain_outputs(auto, tmp_path / "elsewhere"), wanted, rtol=1e-4, atol=1e-4)


def test_the_base_model_takes_no_space_and_is_named(tmp_path: Path) -> None:
    adapter_of(tmp_path, "llama", "generation")
    file = tmp_path / "adapter" / "model.safetensors"
    assert file.samefile(tmp_path / "base" / "model.safetensors")
    made = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert made["base_model_name_or_path"] == str(tmp_path / "base")
    assert (made["task_type"], made["r"]) == ("CAUSAL_LM", 2)
    assert has_adapter(tmp_path / "adapter")
    assert not has_adapter(tmp_path / "base")


def test_an_adapter_is_no_base_of_another(tmp_path: Path) -> None:
    model = adapter_of(tmp_path, "llama", "generation")
    with pytest.raises(RefusedError, match=r"lora_merge: is false, but the base model .* is itself an adapter"):
        save_adapted(model, tmp_path / "second", tiny_tokenizer(), str(tmp_path / "adapter"), None)
