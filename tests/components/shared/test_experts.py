"""Mixtures of experts: transformers' balancing loss, over all tokens of a step however they are divided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixtune.components.base_model import model_problems
from mixtune.components.config import load
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model.checks import check_model
from mixtune.components.shared.model.expert_types import BALANCED
from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import Segment, collate
from mixtune.components.shared.training.lora import add_adapters, merge_adapters
from mixtune.components.shared.training.variant import TrainingVariant

from .compared import Tensors, assert_close, assert_same_movement, weights_of
from .tiny import BALANCE_WEIGHT, mixture, random_documents, tiny_tokenizer
from .trained import run, write_both

pytestmark = pytest.mark.numeric


def rows(count: int) -> list[list[Segment]]:
    return [[Segment(tokens, 1, pretrain=True)] for tokens in random_documents(count, 3)]


def gradients(model: MixedModel) -> Tensors:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", BALANCED)
def test_one_document_has_the_loss_of_transformers(kind: str) -> None:
    model = mixture(kind)
    check_model(model, kind)
    (row,) = rows(1)
    tokens = torch.from_numpy(np.asarray(row[0].tokens))[None]
    theirs = model.lm(input_ids=tokens, labels=tokens, output_router_logits=True, use_cache=False)
    theirs.loss.backward()
    wanted = {name: gradient.clone() for name, gradient in gradients(model).items()}
    assert any("gate" in name or "router" in name for name in wanted)
    model.zero_grad()
    batch = collate([row], 60, width_multiple=8)
    found = model(batch, 1 / row[0].num_supervised, 0.0, routing=model.routing(batch))
    found["weighted"].backward()
    assert float(found["router_aux"]) == pytest.approx(float(theirs.aux_loss), rel=1e-5)
    assert float(found["weighted"]) == pytest.approx(float(theirs.loss), rel=1e-5)
    assert_close(gradients(model), wanted, 1e-5)


def test_the_loss_of_a_batch_is_the_sum_over_its_parts() -> None:
    model, documents = mixture(), rows(5)
    whole = collate(documents, 60)
    parts = [collate(documents[:2], 60), collate(documents[2:], 60)]
    routing = model.routing(whole)
    counted = model.routing(parts[0]) + model.routing(parts[1])
    torch.testing.assert_close(counted.choices, routing.choices)
    assert float(routing.rows) == 2 * sum(len(row[0].tokens) for row in documents), "tokens of two layers, no padding"
    model(whole, 1.0, 0.0, routing=routing)["weighted"].backward()
    wanted = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    for part in parts:
        model(part, 1.0, 0.0, routing=routing)["weighted"].backward()
    assert_close(gradients(model), wanted, 1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("data"), "classification")


def trained(folder: Path, **options: Any) -> tuple[MixedModel, list[dict[str, Any]]]:
    model = mixture(**options.pop("changes", {}))
    model.add_head("classification", ["a", "b"], 0)
    model, result = run(folder, model=model, learning_rate=0.1, **options)
    return model, result.curve


@pytest.mark.usefixtures("plain_descent")
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_training_does_not_depend_on_its_micro_batches(folder: Path, weight: float) -> None:
    start = mixture()
    start.add_head("classification", ["a", "b"], 0)
    whole, curve = trained(folder, weight=weight, micro_batch_size=64)
    assert all(entry["router_aux_loss"] > 0 for entry in curve)
    for options in ({"micro_batch_size": 1}, {"micro_batch_size": 1, "gradient_checkpointing": True}):
        divided, again = trained(folder, weight=weight, **options)
        assert_same_movement(weights_of(divided), weights_of(whole), weights_of(start))
        for left, right in zip(again, curve, strict=True):
            assert left["router_aux_loss"] == pytest.approx(right["router_aux_loss"], rel=1e-5)


def test_a_weight_of_zero_costs_no_pass(folder: Path) -> None:
    _, curve = trained(folder, changes={"router_aux_loss_coef": 0.0}, steps=2)
    assert all("router_aux_loss" not in entry for entry in curve)


def test_it_is_saved_and_loaded_and_takes_adapters(folder: Path, tmp_path: Path) -> None:
    model, _ = trained(folder, variant=TrainingVariant(lora_rank=2), steps=2)
    model.save(tmp_path, tiny_tokenizer())
    again = load_model(tmp_path)
    assert again.balance_weight == BALANCE_WEIGHT
    batch = collate(rows(1), 60)
    torch.testing.assert_close(again.eval().hidden(batch), model.eval().hidden(batch))


def test_adapters_of_experts_are_merged_exactly() -> None:
    model, batch = mixture().eval(), collate(rows(2), 60)
    add_adapters(model, 2)
    adapted = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for weight in adapted:
            weight.normal_(std=0.1)
        wanted = model.hidden(batch)
        merge_adapters(model)
        torch.testing.assert_close(model.hidden(batch), wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(mixture().eval().hidden(batch), wanted, atol=1e-2)


def test_adapters_of_experts_must_be_merged(folder: Path) -> None:
    with pytest.raises(RefusedError, match=r"lora_merge: is false, but the model is a mixture of experts"):
        trained(folder, variant=TrainingVariant(lora_rank=2, lora_merge=False))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 8},
            "is a mixture of experts of type deepseek_v3, and mixtune does not",
        ),
        (
            {"model_type": "jamba", "num_experts": 16},
            "is a mixture of experts of type jamba, and mixtune does not know",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 8, "router_aux_loss_coef": None},
            "router_aux_loss_coef in config.json",
        ),
    ],
)
def test_a_family_whose_loss_is_not_known_is_refused(tmp_path: Path, config: dict[str, Any], sentence: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    sources: dict[str, Any] = {"pretrain": {"source": "embedded"}, "finetune": {"source": "embedded"}}
    given = load({"model": {"base": str(tmp_path)}, "data": sources})
    assert any(sentence in problem for problem in model_problems(given))


def test_compiling_is_refused(folder: Path) -> None:
    with pytest.raises(RefusedError, match=r"compile: (does not work with a mixture of experts|needs a C)"):
        trained(folder, compile=True)
