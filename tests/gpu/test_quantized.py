"""Adapters over weights of 4 bits (QLoRA)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mixtune.components.mixed.config import MixedCandidate
from mixtune.components.shared.artifacts import ModelCard, read_jsonl
from mixtune.components.shared.model.adapters import is_adapted
from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.model.quantization import is_quantized
from tests.components.stages import Stages

from .bounds import needs_gpu

pytestmark = [needs_gpu, pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")]


def test_an_adapter_over_quantised_weights_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.pretrain()
    folder = stages.mixed(
        MixedCandidate(
            id="mixed-0.3-lora-2", mix_weight=0.3, lora_rank=2, lora_merge=False, lora_4bit=True, learning_rate=0.05
        ),
        steps=40,
    )
    assert ModelCard.load(folder).quantized
    losses = [entry["loss"] for entry in read_jsonl(folder / "training.jsonl")]
    assert losses[-1] < losses[0]
    model = load_model(folder, torch.device("cuda", 0))
    assert is_quantized(model)
    assert is_adapted(model), "adapters over quantised weights stay apart"
