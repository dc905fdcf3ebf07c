"""Steps of the pipeline as a container runs them, and a training that does not fit into the GPU's memory."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mixtune.components.mixed.config import MixedCandidate, MixedStep, MixedTraining
from mixtune.components.shared.artifacts import ModelCard, read_jsonl
from mixtune.components.shared.errors import MixtuneError
from mixtune.components.shared.model.device import GPUS
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.outcome import load_outcomes
from tests.components.evaluate.made import write_model
from tests.components.shared.tiny import write_data
from tests.components.shared.trained import run, write_both

from .bounds import needs_gpu
from .conftest import ALL

ROOT = Path(__file__).resolve().parents[2]


def step(folder: Path, name: str, config: str, artifacts: tuple[str, ...], *parameters: str) -> None:
    """Runs `mixtune step` in a process of its own, asking for a GPU where there is one."""
    (folder / f"{name}.json").write_text(config, encoding="utf-8")
    given = [f"--artifact={artifact}={folder / artifact}" for artifact in artifacts]
    command = [sys.executable, "-m", "mixtune.pipelines.cli", "step", name, f"--config={folder / name}.json", *given]
    environment = {**os.environ, "MIXTUNE_OUTCOME_DIR": str(folder / "outcomes")}
    environment |= {GPUS: "1"} if torch.cuda.is_available() else {}
    done = subprocess.run(
        [*command, *parameters], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not ALL, reason="other tests do this on a CPU; GPU_TESTS=all does it here too")
def test_one_training_step_of_the_pipeline(tmp_path: Path, device: torch.device) -> None:
    write_model(tmp_path / "start", "pretrained", "pretrained")
    write_data(tmp_path / "pretrain_data", "pretrain", None)
    write_data(tmp_path / "finetune_data", "finetune", "generation", seed=7)
    training = MixedTraining(steps=4, batch_size=4, log_every_steps=1)
    candidate = MixedCandidate(id="mixed-0.3", mix_weight=0.3)
    step(
        tmp_path,
        "mixed",
        MixedStep(seed=0, max_length=32, mixed=training).to_json(),
        ("start", "pretrain_data", "finetune_data", "model", "metrics"),
        f"--parameter=candidate={candidate.to_json()}",
    )
    card = ModelCard.load(tmp_path / "model")
    assert card.device == (torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    if device.type == "cuda":
        assert card.precision == "bf16"
    assert [entry["step"] for entry in read_jsonl(tmp_path / "model" / "training.jsonl")] == [1, 2, 3, 4]
    assert [outcome.kind for outcome in load_outcomes(tmp_path / "outcomes")] == ["done"]
    metrics = json.loads((tmp_path / "metrics").read_text())
    assert metrics["loss"] > 0


def wide() -> MixedModel:
    """Its activations need much more memory than its weights: 2.6 GB for a full row of 2,048 tokens."""
    torch.manual_seed(0)
    return MixedModel(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=61, pad_token_id=60, hidden_size=64, intermediate_size=60_000, num_hidden_layers=1,
                num_attention_heads=2,
            )
        )
    )  # fmt: skip


def attempt(folder: Path, micro_batch_size: int) -> str | None:
    """Trains, and returns what is said if it fails."""
    try:
        run(folder, "generation", model=wide(), steps=1, batch_size=200, micro_batch_size=micro_batch_size)
    except MixtuneError as error:
        return str(error)
    return None


@needs_gpu
def test_a_training_without_enough_memory_says_what_helps_and_it_helps(tmp_path: Path) -> None:
    folder = write_both(tmp_path, "generation", text=400, labels=400)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2e9) / total)
    sizes = [256]
    try:
        while (sentence := attempt(folder, sizes[-1])) is not None:
            gc.collect()
            torch.cuda.empty_cache()
            found = re.fullmatch(
                r"out of memory on .+ with \d+ rows of \d+ tokens in one pass; set micro_batch_size to (\d+) or "
                r"gradient_checkpointing to true, or use more memory",
                sentence,
            )
            assert found is not None, sentence
            sizes.append(int(found[1]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(sizes) > 1, "there was enough memory"
