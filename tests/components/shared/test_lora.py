"""Low-rank adapters: the weights below stay as they are until the adapters are merged, and what comes out is a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import Segment, collate
from mixtune.components.shared.training import loop as training
from mixtune.components.shared.training.lora import add_adapters, merge_adapters
from mixtune.components.shared.training.optimizer import is_task_head
from mixtune.components.shared.training.variant import TrainingVariant

from .compared import assert_same_movement, weights_of
from .tiny import ARCHITECTURES, ENCODERS, random_documents, tiny_model, tiny_tokenizer
from .trained import run, write_both

pytestmark = pytest.mark.numeric

ALL = [*ARCHITECTURES, *ENCODERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("data"), "classification")


def logits(model: MixedModel) -> tuple[Tensor, Tensor]:
    batch = collate([[Segment(np.asarray(tokens)) for tokens in random_documents(3, 4)]], 60, label_all=True)
    model.eval()
    with torch.no_grad():
        hidden = model.hidden(batch)
        return model.lm_logits(hidden), model.task_logits(hidden, batch)


def plain_name(name: str) -> str:
    return name.replace("base_model.model.", "").replace("base_layer.", "")


@pytest.mark.parametrize("architecture", ALL)
def test_training_moves_the_adapters_and_the_head_alone(
    folder: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in tiny_model(architecture, task="classification").named_parameters()}
    seen: dict[str, Any] = {}

    def look_and_merge(model: MixedModel) -> None:
        """The real merge; looks at the model as it is just before."""
        seen["weights"] = {plain_name(name): value.clone() for name, value in model.named_parameters()}
        seen["logits"] = logits(model)
        merge_adapters(model)

    monkeypatch.setattr(training, "merge_adapters", look_and_merge)
    model, _ = run(folder, architecture=architecture, variant=TrainingVariant(lora_rank=3), layer_decay=0.9)
    for name, value in before.items():
        assert torch.equal(seen["weights"][name], value) != is_task_head(name), name
    adapters = {name: value for name, value in seen["weights"].items() if "lora_" in name}
    assert adapters
    assert all(3 in value.shape for value in adapters.values())
    assert all(bool(value.any()) for value in adapters.values()), "all of them learn"
    for adapted, merged in zip(seen["logits"], logits(model), strict=True):
        torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys(), "no trace of the adapters"
    assert all(value.requires_grad for value in after.values())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.removesuffix(".lora_B.default.weight") + ".weight" for name in adapters if "lora_B" in name} == {
        name for name in moved if not is_task_head(name)
    }


@pytest.mark.parametrize("architecture", ALL)
def test_it_is_saved_as_a_plain_model(folder: Path, tmp_path: Path, architecture: str) -> None:
    model, _ = run(folder, architecture=architecture, variant=TrainingVariant(lora_rank=2), steps=2)
    model.save(tmp_path, tiny_tokenizer(ends=architecture in ENCODERS))
    assert not list(tmp_path.glob("adapter*"))
    again = load_model(tmp_path)
    for one, other in zip(logits(model), logits(again), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("architecture", ALL)
def test_fresh_adapters_change_nothing(architecture: str) -> None:
    model = tiny_model(architecture, task="classification")
    wanted = logits(model)
    add_adapters(model, 4)
    for one, other in zip(logits(model), wanted, strict=True):
        torch.testing.assert_close(one, other)
    merge_adapters(model)
    for name, value in tiny_model(architecture, task="classification").named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], value)


@pytest.mark.usefixtures("plain_descent")
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_it_goes_with_every_lambda_and_with_checkpointing(folder: Path, weight: float) -> None:
    variant = TrainingVariant(lora_rank=2)
    plain, _ = run(folder, weight=weight, variant=variant, learning_rate=0.5)
    again, _ = run(folder, weight=weight, variant=variant, learning_rate=0.5, gradient_checkpointing=True)
    start = tiny_model(task="classification")
    assert_same_movement(weights_of(again), weights_of(plain), weights_of(start))
