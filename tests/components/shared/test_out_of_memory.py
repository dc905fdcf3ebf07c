"""A training that needs more memory than there is ends in one sentence, and what the sentence advises helps."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from mixtune.components.evaluate.config import EvaluateStep
from mixtune.components.shared.artifacts import Artifact
from mixtune.components.shared.errors import MixtuneError, is_out_of_memory
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import Segment
from mixtune.components.shared.outcome import load_outcomes
from mixtune.components.shared.runtime import launch
from mixtune.components.shared.training.out_of_memory import smaller_micro_batch
from mixtune.components.shared.training.streams import StepData

from .trained import run, write_both


@given(rows=st.integers(2, 40), width=st.integers(1, 64), max_length=st.integers(64, 128), size=st.integers(1, 40))
def test_the_advised_size_gives_smaller_micro_batches(rows: int, width: int, max_length: int, size: int) -> None:
    data = StepData([[Segment(np.zeros(width, np.int64))]] * rows, 0, 0, 0, 0, max_length)

    def largest(micro_batch_size: int) -> int:
        return max(map(len, data.share(0, 1, micro_batch_size)))

    before = largest(size)
    advised = smaller_micro_batch(before, width, max_length, size)
    if advised is None:
        assert size == 1 or before == 1 or largest(1) == before, "there is one that helps"
        return
    assert 1 <= advised < size
    assert largest(advised) <= before // 2 or (advised == 1 and largest(1) < before)


@contextlib.contextmanager
def memory_left(num_bytes: int) -> Iterator[None]:
    """Lets the process allocate no more than this on top of what it has."""
    in_use = int(re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def model() -> MixedModel:
    """Its activations need much more memory than its weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 15_000,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return MixedModel(LlamaForCausalLM(LlamaConfig(vocab_size=61, pad_token_id=60, **sizes)))


def attempt(folder: Path, micro_batch_size: int) -> str | None:
    """Trains, and returns what is said if it fails."""
    try:
        run(folder, "generation", model=model(), steps=1, batch_size=40, micro_batch_size=micro_batch_size)
    except MixtuneError as error:
        return str(error)
    return None


def test_a_training_without_enough_memory_says_what_helps_and_it_helps(tmp_path: Path) -> None:
    folder = write_both(tmp_path, "generation", text=80, labels=80)
    sizes = [64]
    run(folder, "generation", model=model(), steps=1, micro_batch_size=1)  # what is allocated once is there now
    with memory_left(100_000_000):
        while (sentence := attempt(folder, sizes[-1])) is not None:
            found = re.fullmatch(
                r"out of memory with \d+ rows of \d+ tokens in one pass; set micro_batch_size to (\d+) or "
                r"gradient_checkpointing to true, or use more memory",
                sentence,
            )
            assert found is not None, sentence
            sizes.append(int(found[1]))
    assert len(sizes) > 1, "there was enough memory"
    assert sizes == sorted(sizes, reverse=True)


def test_evaluation_says_its_own_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTUNE_OUTCOME_DIR", str(tmp_path / "outcomes"))
    config = EvaluateStep(max_length=32, batch_size=8, metric="exact_match", max_new_tokens=1, max_tokens=None)

    def no_memory(*given: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("mixtune.components.evaluate.step.run", no_memory)
    with pytest.raises(SystemExit):
        launch("evaluate", config.to_json(), {"model": Artifact(str(tmp_path / "model"))})
    (outcome,) = load_outcomes(tmp_path / "outcomes")
    assert outcome.sentences == ["out of memory; set evaluate.batch_size to 4, or use more memory"]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_what_torch_says_is_recognised(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("out of resource: shared memory"))
