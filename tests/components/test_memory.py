"""The estimate of a training's memory, against the peak of what torch allocates in one."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from mixtune.components.config import Config, load
from mixtune.components.memory import Shape, estimate, memory_note
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import Segment, collate

HIDDEN, VOCABULARY, ROWS, LENGTH = 128, 1000, 4, 128


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages of all tensors that operations return, as long as they live."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.alive: dict[int, Any] = {}
        for weight in model.parameters():
            self.add(weight)

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.remove(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def remove(self, key: int, size: int) -> None:
        self.now -= size
        del self.alive[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.add(tensor)
        return found


def made(kind: str, layers: int) -> PreTrainedModel:
    if kind == "gpt2":
        sizes: dict[str, Any] = {
            "n_embd": HIDDEN,
            "n_layer": layers,
            "n_head": 4,
            "n_positions": LENGTH,
            "vocab_size": VOCABULARY,
        }
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    if kind == "bert":
        none: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForMaskedLM(BertConfig(**sizes, **none, intermediate_size=512, max_position_embeddings=LENGTH))
    few: dict[str, Any] = {"num_key_value_heads": 2} if kind == "llama, few keys" else {}
    return LlamaForCausalLM(LlamaConfig(**sizes, **few, intermediate_size=352, tie_word_embeddings=kind == "llama"))


def peak_of(model: MixedModel, bf16: bool) -> int:
    """Trains two steps: the optimizer's states are made in the first."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    draw = np.random.default_rng(0)
    rows = [[Segment(draw.integers(5, VOCABULARY, LENGTH), 1, pretrain=True)] for _ in range(ROWS)]
    with Peak(model) as peak:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                losses = model(collate(rows, 0), 1 / (ROWS * LENGTH), 0.0)
            losses.pop("weighted").backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return peak.peak


@pytest.mark.parametrize(
    ("kind", "layers", "bf16", "recomputed"),
    [
        ("llama", 2, False, False),
        ("llama", 6, False, False),
        ("llama", 6, True, False),
        ("llama", 6, False, True),
        ("llama, few keys", 6, False, False),
        ("gpt2", 6, False, False),
        ("gpt2", 6, True, False),
        ("bert", 6, False, False),
        ("bert", 6, True, True),
    ],
)
def test_the_estimate_is_within_20_percent_of_the_peak(kind: str, layers: int, bf16: bool, recomputed: bool) -> None:
    model = MixedModel(made(kind, layers)).train()
    if recomputed:
        model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    shape = Shape.of(model.config.to_dict())
    assert shape is not None
    assert shape.weights == pytest.approx(sum(weight.numel() for weight in model.parameters()), rel=0.06)
    found = estimate(shape, ROWS * LENGTH, bf16, recomputed)
    assert found.total == pytest.approx(peak_of(model, bf16), rel=0.2), str(found)


LARGE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    "intermediate_size": 11008, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
"""The shape of a model with 6.7 billion weights."""


def config(folder: Path, model: dict[str, Any], gpus: int, **mixed: Any) -> Config:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model))
    sources = {"pretrain": {"source": "embedded"}, "finetune": {"source": "embedded"}}
    options: dict[str, Any] = {
        "model": {"base": str(folder), "max_length": 512},
        "data": sources,
        "placement": {"gpus": gpus},
    }
    return load({**options, "pretrain": {"steps": 0}, "mixed": mixed})


def test_check_says_how_many_gpus_a_large_model_needs(tmp_path: Path) -> None:
    note = memory_note(config(tmp_path / "a", LARGE, 8, gradient_checkpointing=True, micro_batch_size=4)) or ""
    assert note.startswith("memory: finetune needs about ")
    assert " GB on each of 8 GPUs (weights " in note
    assert note.endswith("; enough GPUs would be 8 of 48 GB or 2 of 80 GB or 1 of 141 GB")
    shape = Shape.of(LARGE)
    assert shape is not None
    whole, sharded = (estimate(shape, 2048, True, True, 8, sharded=way) for way in (False, True))
    assert whole.total > 100e9 > 40e9 > sharded.total


def test_penalties_need_a_second_model(tmp_path: Path) -> None:
    small = LARGE | {"num_hidden_layers": 4}
    notes = [
        memory_note(config(tmp_path / str(len(controls)), small, 1, micro_batch_size=9, controls=controls))
        for controls in ({}, {"kl_weights": [0.1]})
    ]
    assert all(note and "memory: mixed needs about" in note for note in notes)
    assert notes[0] != notes[1]


@pytest.mark.parametrize("change", [{"num_local_experts": 8}, {"hidden_size": None}, {"vocab_size": None}])
def test_a_shape_that_is_not_understood_gets_no_estimate(tmp_path: Path, change: dict[str, Any]) -> None:
    assert memory_note(config(tmp_path / "a", LARGE | change, 1)) is None


def test_a_small_model_without_gpus_gets_none(tmp_path: Path) -> None:
    assert memory_note(config(tmp_path / "a", LARGE | {"num_hidden_layers": 1, "vocab_size": 1000}, 0)) is None
