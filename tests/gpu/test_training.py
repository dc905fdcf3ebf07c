"""Trainings: the options that save time or memory, resuming, SIGTERM, and how often a step waits for the GPU."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtune.components.shared.checkpoints.store import CHECKPOINT_DIR
from mixtune.components.shared.config import Task
from mixtune.components.shared.training.reference_models import ReferenceModel
from mixtune.components.shared.training.variant import TrainingVariant
from tests.components.shared import cut_off
from tests.components.shared.compared import Tensors, assert_same_movement, weights_of
from tests.components.shared.cut_off import CutOffError, curve, equal
from tests.components.shared.tiny import ARCHITECTURES, ENCODERS, tiny_model
from tests.components.shared.trained import run, write_both

from .bounds import BF16_LOSS, RUN_TO_RUN, needs_compiler, needs_gpu
from .conftest import ALL

CHOSEN = (*ARCHITECTURES, *ENCODERS) if ALL else ("llama",)
also_elsewhere = pytest.mark.skipif(not ALL, reason="other tests do this on a CPU; GPU_TESTS=all does it here too")
VARIANTS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "masked": {"architecture": "bert", "task": "question_answering"},
    "generation": {"architecture": "llama", "task": "generation"},
}


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CHECKPOINT_DIR, str(tmp_path / "checkpoints"))
    return tmp_path / "checkpoints"


def cpu(tensors: Tensors) -> Tensors:
    return {name: one.cpu() for name, one in tensors.items()}


@pytest.mark.usefixtures("plain_descent")
@pytest.mark.parametrize("architecture", CHOSEN)
@pytest.mark.parametrize(
    "option",
    [
        {"gradient_checkpointing": True},
        pytest.param({"compile": True}, marks=[needs_gpu, needs_compiler]),
        {"micro_batch_size": 1},
    ],
    ids=["gradient_checkpointing", "compile", "micro_batches"],
)
def test_an_option_that_saves_time_or_memory_gives_the_same_weights(
    tmp_path: Path, architecture: str, option: dict[str, Any]
) -> None:
    folder = write_both(tmp_path, "classification")
    options: dict[str, Any] = {"architecture": architecture, "learning_rate": 0.1, "max_grad_norm": 1e3}
    plain, _ = run(folder, **options)
    other, _ = run(folder, **options, **option)
    start = tiny_model(architecture, task="classification")
    assert_same_movement(cpu(weights_of(other)), cpu(weights_of(plain)), weights_of(start), RUN_TO_RUN)


@also_elsewhere
@pytest.mark.usefixtures("plain_descent")
@pytest.mark.parametrize(("architecture", "task"), [("llama", "generation"), ("bert", "question_answering")])
def test_losses_in_bf16_are_near_those_in_float32(
    tmp_path: Path, record: Callable[..., None], architecture: str, task: Task
) -> None:
    folder = write_both(tmp_path, task)
    curves = [
        run(folder, task, architecture, precision=precision, steps=2)[1].curve for precision in ("float32", "bf16")
    ]
    for name in ("loss_pretrain", "loss_finetune"):
        one, other = (float(each[0][name] or 0) for each in curves)
        record(**{name: abs(other - one) / one})
        assert other == pytest.approx(one, rel=BF16_LOSS)
        assert other != one, "it was not computed in bf16"


@also_elsewhere
@pytest.mark.usefixtures("deterministic", "checkpoints")
@pytest.mark.parametrize("variant", VARIANTS)
def test_with_deterministic_algorithms_a_resumed_training_is_bitwise_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    training = cut_off.Training(tmp_path, **VARIANTS[variant])
    with monkeypatch.context() as patch:
        patch.setenv(CHECKPOINT_DIR, "")
        expected, whole = training.run()
    with pytest.raises(CutOffError):
        training.run(cut_off_after=7)
    model, result = training.run()
    assert "goes on from the checkpoint of step 6" in training.lines[-1]
    assert equal(expected, model)
    assert curve(result) == curve(whole)


@also_elsewhere
@pytest.mark.usefixtures("plain_descent", "checkpoints")
def test_without_them_it_ends_nearby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = cut_off.Training(tmp_path, learning_rate=0.05)
    with monkeypatch.context() as patch:
        patch.setenv(CHECKPOINT_DIR, "")
        expected, _ = training.run()
    with pytest.raises(CutOffError):
        training.run(cut_off_after=7)
    model, _ = training.run()
    start = weights_of(tiny_model("gpt2", task="classification"))
    assert_same_movement(weights_of(model), weights_of(expected), start, RUN_TO_RUN)


@also_elsewhere
@pytest.mark.usefixtures("deterministic", "checkpoints")
def test_sigterm_saves_the_state_and_the_next_attempt_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = cut_off.Training(tmp_path, checkpoint_steps=None)
    with monkeypatch.context() as patch:
        patch.setenv(CHECKPOINT_DIR, "")
        expected, _ = training.run()

    def signalled(step: Callable[[int], Any], after: int) -> Callable[[int], Any]:
        def once(number: int) -> Any:
            if number == after:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(number)

        return once

    with monkeypatch.context() as patch:
        patch.setattr(cut_off, "_cutting", signalled)
        with pytest.raises(SystemExit) as ended:
            training.run(cut_off_after=5)
    assert ended.value.code == 143
    model, _ = training.run()
    assert any("goes on from the checkpoint of step" in line for line in training.lines)
    assert equal(expected, model)


@needs_gpu
@pytest.mark.parametrize("variant", ["plain", "penalties"])
def test_a_step_waits_for_the_gpu_once(tmp_path: Path, record: Callable[..., None], variant: str) -> None:
    """PyTorch warns of each operation that waits, and Python says where. Those inside of transformers are only reported."""
    folder = write_both(tmp_path, "generation")
    model = tiny_model("llama", task="generation")
    penalties = TrainingVariant(start=ReferenceModel(model), kl_weight=0.1, l2sp_weight=0.1)
    steps = 12
    options: dict[str, Any] = {"task": "generation", "micro_batch_size": 2, "log_every_steps": 100}
    run(folder, model=model, steps=1, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run(folder, model=model, steps=steps, variant=penalties if variant == "penalties" else None, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    in_steps = [one for one in waits if "/components/" in one.filename]
    record(all_waits=len(waits), in_steps=len(in_steps), steps=steps)
    # The norm of each step, one measurement of both streams' gradients, one log entry, and what comes before and after.
    assert len(in_steps) <= steps + 8, [f"{one.filename}:{one.lineno}" for one in in_steps]


@needs_gpu
def test_what_a_training_makes_of_the_gpu_is_measured(tmp_path: Path) -> None:
    _, result = run(write_both(tmp_path, "generation"), "generation", precision="bf16")
    used = result.utilisation
    assert used.peak_memory_bytes is not None
    assert 0 < used.peak_memory_bytes <= torch.cuda.get_device_properties(0).total_memory
    assert used.mfu is None or 0 < used.mfu < 1
    assert used.gpu_utilisation is None or 0 <= used.gpu_utilisation <= 1
