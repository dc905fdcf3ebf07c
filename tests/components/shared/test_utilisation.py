"""FLOPs by the shapes are those that PyTorch counts; what was not measured is not claimed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mixtune.components.shared.artifacts import Artifact, ModelCard, Utilisation
from mixtune.components.shared.config import Task
from mixtune.components.shared.model.packing import Segment, collate
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.training.lora import add_adapters
from mixtune.components.shared.training.saving import save_trained
from mixtune.components.shared.training.streams import StepData
from mixtune.components.shared.training.utilisation import FlopsOfModel, peak_flops

from .tiny import ENCODERS, tiny_model, tiny_tokenizer
from .trained import PAD, run, write_both

LENGTH = 32


def step_of(architecture: str, task: Task) -> StepData:
    """Documents that fill a row each, so that all that is computed is needed."""
    draw = np.random.default_rng(0)
    tokens = [draw.integers(0, 57, LENGTH) for _ in range(6)]
    masked = np.arange(1, LENGTH, 4) if architecture in ENCODERS else None
    windows = [[Segment(one, pretrain=True, masked=masked, originals=one if masked is None else one[masked])]
               for one in tokens[:4]]  # fmt: skip
    label = int(task == "classification") - 1
    return StepData.packed(windows, [[Segment(one, LENGTH - 3, label=label)] for one in tokens[4:]], LENGTH)


@pytest.mark.parametrize(
    ("architecture", "task", "lora"),
    [
        ("llama", "generation", False), ("llama", "classification", False), ("llama", "generation", True),
        ("qwen2", "generation", False), ("gpt2", "generation", False), ("bert", "classification", False),
    ],
)  # fmt: skip
def test_flops_are_those_that_pytorch_counts(architecture: str, task: Task, lora: bool) -> None:
    model = tiny_model(architecture, task=None if task == "generation" else task, attention="eager")
    if lora:
        add_adapters(model, 4)
    data = step_of(architecture, task)
    batch = collate(data.rows, PAD)
    with FlopCounterMode(display=False) as counter:
        losses = model(batch, 0.3 / data.num_pretrain, 0.7 / data.num_finetune)
        torch.autograd.backward(losses["weighted"])
    flops = FlopsOfModel(model)
    assert flops.known
    # Eager attention also computes what the causal mask hides: 12 FLOPs for each layer, pair and dimension.
    config = model.config.get_text_config()
    hidden = 0 if architecture in ENCODERS else len(data.rows) * LENGTH * (LENGTH - 1) // 2
    masked = 12 * config.num_hidden_layers * config.hidden_size * hidden
    # The counter also sees what is small: the rotary embedding, and the head's own input.
    assert flops.of(data) == pytest.approx(counter.get_total_flops() - masked, rel=0.05)


def test_peaks_are_known_by_the_name_of_the_device_and_for_bf16_alone() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA L40S", "bf16") == 362e12
    assert peak_flops("NVIDIA L4", "bf16") == 121e12
    assert [peak_flops(name, "bf16") for name in ("NVIDIA L40", "cpu", "Tesla T4")] == [None] * 3
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None


def test_a_training_on_a_cpu_knows_its_rate_and_memory_and_no_more(tmp_path: Path) -> None:
    model, result = run(write_both(tmp_path, "generation"), "generation")
    found = result.utilisation
    assert found.tokens_per_second == pytest.approx(sum(result.tokens.values()) / result.seconds)
    assert found.flops_per_second == pytest.approx(result.flops / result.seconds)
    assert found.peak_memory_bytes is not None
    assert found.peak_memory_bytes > 50 << 20
    assert (found.mfu, found.gpu_utilisation) == (None, None)
    metrics = Artifact(str(tmp_path / "metrics"))
    card = ModelCard(id="mixed-0.3", kind="mixed")
    save_trained(model, tiny_tokenizer(), card, result, Context.for_tests(), Artifact(str(tmp_path / "model")), metrics)
    assert ModelCard.load(tmp_path / "model").utilisation == found
    assert metrics.metadata["peak_memory_bytes"] == found.peak_memory_bytes
    assert "mfu" not in metrics.metadata


def test_experts_are_not_counted() -> None:
    model = tiny_model("llama")
    model.lm.base_model.register_parameter("experts", torch.nn.Parameter(torch.zeros(2, 3, 4)))
    assert not FlopsOfModel(model).known
    assert Utilisation().flops_per_second is None
