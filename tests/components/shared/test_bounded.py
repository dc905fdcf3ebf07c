"""A sharded model is loaded and written by processes none of which holds it whole."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from . import bounded
from .pair import ROOT, TORCHRUN


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_no_process_holds_the_whole_model(tmp_path: Path, dtype: torch.dtype) -> None:
    config = LlamaConfig(
        vocab_size=61, hidden_size=512, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=8, pad_token_id=60
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.save_pretrained(tmp_path / "model")
    # What is freed goes back at once. With glibc's own threshold, which grows, loading in bf16 took 1.4 to 1.9 times as much.
    at_once = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
    environment = {**os.environ, **at_once, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, "--nproc-per-node=2", "-m", bounded.__name__, str(tmp_path / "model"), str(tmp_path / "out")]
    subprocess.run(command, check=True, env=environment)
    whole = 4 * sum(weight.numel() for weight in model.parameters())
    for rank in (0, 1):
        rises = json.loads((tmp_path / f"rises-{rank}.json").read_text())
        assert rises["load"] < 0.15 * whole, (
            "mapped from the file; the checks convert a module, here most of a tenth of it"
        )
        assert rises["shard"] < 0.75 * whole, "half of it, and what is converted"
        assert rises["save"] < 0.6 * whole, "a file of at most 50 MB here, and a tensor"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.float32
    wanted = dict(model.named_parameters())
    for name, weight in again.named_parameters():
        assert torch.equal(weight, wanted[name].float()), name
