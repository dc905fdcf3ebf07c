"""Evaluation and generation give what they give on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mixtune.components.evaluate.likelihood import batches, head_logits, losses
from mixtune.components.shared.config import Task
from mixtune.components.shared.model.generation import generate
from mixtune.components.shared.model.packing import Segment
from mixtune.components.shared.running.context import Context
from tests.components.shared.tiny import random_documents, tiny_model, tiny_tokenizer
from tests.components.shared.trained import example

from .bounds import BF16_LOSS, NATS
from .conftest import ALL

PAD = 60
TASKS: tuple[Task, ...] = ("classification", "multi_label", "regression", "question_answering")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"] if ALL else ["llama"])
def test_losses_of_texts(device: torch.device, record: Callable[..., None], architecture: str, precision: str) -> None:
    work = batches([Segment(tokens, key=key) for key, tokens in enumerate(random_documents(12, 1))], 32, 4)
    found: list[Any] = []
    with Context.for_tests().progress(0, "rows") as progress:
        for where in (torch.device("cpu"), device):
            model = tiny_model(architecture).eval().to(where)
            model.precision = "float32" if where.type == "cpu" and not found else precision  # type: ignore[assignment]
            found.append(losses(model, work, 12, PAD, progress))
    (wanted, counts), (nats, other_counts) = found
    assert counts.tolist() == other_counts.tolist()
    worst = float(np.abs(nats / wanted - 1).max())
    record(error=worst)
    assert worst <= (NATS if precision == "float32" else BF16_LOSS)


@pytest.mark.parametrize("task", TASKS if ALL else TASKS[:1])
def test_outputs_of_heads(device: torch.device, record: Callable[..., None], task: Task) -> None:
    segments = [example(task, tokens) for tokens in random_documents(12, 2, low=4)]
    work = batches([Segment(**{**vars(one), "key": key}) for key, one in enumerate(segments)], 32, 4)
    model = tiny_model("bert", task=task).eval()
    with Context.for_tests().progress(0, "rows") as progress:
        model.precision = "float32"
        wanted = head_logits(copy.deepcopy(model), work, PAD, progress)
        found = head_logits(model.to(device), work, PAD, progress)
    assert found.keys() == wanted.keys()
    scale = max(float(np.abs(logits).max()) for logits in wanted.values())
    worst = max(float(np.abs(found[key] - wanted[key]).max()) for key in wanted) / scale
    record(error=worst)
    assert worst <= NATS


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"] if ALL else ["llama"])
def test_answers_are_the_same_words(device: torch.device, architecture: str) -> None:
    prompts, tokenizer = random_documents(12, 3, low=2, high=12), tiny_tokenizer()
    model = tiny_model(architecture).eval()
    model.precision = "float32"
    with Context.for_tests().progress(0, "prompts") as progress:
        wanted = generate(copy.deepcopy(model), tokenizer, prompts, 8, 4, progress)
        found = generate(model.to(device), tokenizer, prompts, 8, 4, progress)
    assert found == wanted
    assert any(wanted)
