"""Weights of 4 bits are refused in plain words wherever they cannot be used. That they train is tested on GPUs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtune.components.checks import find_problems, missing_here
from mixtune.components.config import Config, load
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model.device import has_gpu
from mixtune.components.shared.model.loading import load_model

from .shared.tiny import tiny_model, tiny_tokenizer

QUANTISED = {"lora_ranks": [4], "lora_4bit": True, "lora_merge": False}


def config(controls: dict[str, Any], **mixed: Any) -> Config:
    sources: dict[str, Any] = {"pretrain": {"source": "embedded"}, "finetune": {"source": "embedded"}}
    return load(
        {
            "model": {"base": "scratch"},
            "data": sources,
            "pretrain": {"steps": 1},
            "mixed": {"controls": controls, **mixed},
        }
    )


@pytest.mark.parametrize(
    ("controls", "mixed", "sentence"),
    [
        ({"lora_merge": True}, {}, "mixed.controls: lora_4bit: needs lora_merge: false"),
        ({}, {"parallelism": "fsdp"}, "mixed: controls.lora_4bit does not work with parallelism: fsdp"),
    ],
)
def test_what_is_not_defined_is_refused(controls: dict[str, Any], mixed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RefusedError) as refused:
        config(QUANTISED | controls, **mixed)
    (problem,) = refused.value.problems
    assert problem.startswith(sentence)


@pytest.mark.skipif(has_gpu() and find_spec("bitsandbytes") is not None, reason="all is here")
def test_what_is_missing_is_named_before_anything_runs(tmp_path: Path) -> None:
    chosen = config(QUANTISED)
    assert any(sentence.startswith("mixed.controls.lora_4bit: needs ") for sentence in missing_here(chosen))
    assert not missing_here(config(QUANTISED | {"lora_ranks": [], "lambdas": [0.0]})), "nothing is quantised"
    (on_cluster,) = find_problems(chosen, gpus=0)
    assert on_cluster.startswith(
        "mixed.controls.lora_4bit: needs an NVIDIA GPU, which a cluster with placement.gpus: 0 lacks;"
    )
    assert not find_problems(chosen, gpus=1), "the image is not known here"
    tiny_model().save(tmp_path, tiny_tokenizer())
    with pytest.raises(RefusedError, match="lora_4bit: needs an NVIDIA GPU, which this environment lacks"):
        load_model(tmp_path, torch.device("cpu"), quantized=True)
