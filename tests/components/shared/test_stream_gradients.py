"""The gradients of the two streams: compared with those of each loss alone, at a small cost, without touching the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mixtune.components.shared.config import LambdaSchedule, Task
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import collate
from mixtune.components.shared.training import stream_gradients
from mixtune.components.shared.training.mix_weight import Constant, MixWeight, Pooled, Scheduled
from mixtune.components.shared.training.stream_gradients import COST, GradientScaled, steps_to_measure
from mixtune.components.shared.training.variant import TrainingVariant

from .cut_off import Training, curve, equal
from .tiny import ENCODERS, tiny_model
from .trained import PAD, both, run, write_both

pytestmark = pytest.mark.numeric

METRICS = ("grad_norm_pretrain", "grad_norm_finetune", "grad_cosine", "norm_share_pretrain", "step_share_pretrain")
NO_CHANGE: dict[str, Any] = {"steps": 1, "learning_rate": 1e-30}


def gradient(model: MixedModel, folder: Path, task: Task, masked: bool, weights: tuple[float, float]) -> torch.Tensor:
    """The gradient of one loss of the first step, by a pass of its own, as one vector."""
    data = both(folder, task, 0.3, masked).step(0)
    model.zero_grad()
    of_token = weights[0] / data.num_pretrain, weights[1] / data.num_finetune
    torch.autograd.backward(model(collate(data.rows, PAD), *of_token)["weighted"])
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.double().flatten() for part in parts])


@pytest.mark.parametrize(
    ("architecture", "task", "micro_batch_size"),
    [("llama", "classification", 1), ("gpt2", "generation", 64), ("bert", "question_answering", 1)],
)
def test_the_gradients_are_those_of_each_loss_alone(
    tmp_path: Path, architecture: str, task: Task, micro_batch_size: int
) -> None:
    folder, masked = write_both(tmp_path, task), architecture in ENCODERS
    _, done = run(folder, task, architecture, 0.3, micro_batch_size=micro_batch_size, max_grad_norm=1e-3, **NO_CHANGE)
    model = tiny_model(architecture, task=task)
    of_text, of_labels = (gradient(model, folder, task, masked, one) for one in ((1.0, 0.0), (0.0, 1.0)))
    whole = 0.3 * of_text + 0.7 * of_labels
    wanted = (
        float(of_text.norm()),
        float(of_labels.norm()),
        float(of_text @ of_labels / of_text.norm() / of_labels.norm()),
        float(0.3 * of_text.norm() / (0.3 * of_text.norm() + 0.7 * of_labels.norm())),
        float(0.3 * of_text @ whole / (whole @ whole)),
    )
    (entry,) = done.curve
    assert [entry[name] for name in METRICS] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert entry["grad_norm"] == pytest.approx(float(whole.norm()), rel=1e-4), "before clipping, as the norms are"


def test_the_training_is_bitwise_the_same_with_and_without_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_dropout = Training(tmp_path)
    monkeypatch.setattr(stream_gradients, "steps_to_measure", lambda steps, scaled: frozenset(range(0, steps, 2)))
    measured, left = with_dropout.run()
    monkeypatch.setattr(stream_gradients, "steps_to_measure", lambda steps, scaled: frozenset())
    plain, right = with_dropout.run()
    assert equal(measured, plain)
    assert [entry["step"] for entry in curve(left) if "grad_cosine" in entry] == [1, 3, 5, 7, 9]
    assert [{name: value for name, value in entry.items() if name not in METRICS} for entry in curve(left)] == curve(
        right
    )


def test_dropout_is_that_of_the_step(tmp_path: Path) -> None:
    """With two different draws the difference of two passes would be noise: here the labels' part, of a small weight."""
    with_dropout = Training(tmp_path, weight=1 - 1e-4, steps=1, learning_rate=1e-30, warmup_steps=0)
    (entry,) = curve(with_dropout.run()[1])
    without = write_both(tmp_path / "without", "classification")
    (expected,) = run(without, "classification", "gpt2", 0.3, **NO_CHANGE)[1].curve
    assert entry["grad_norm_finetune"] == pytest.approx(expected["grad_norm_finetune"], rel=0.5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_single_stream_has_nothing_to_compare(tmp_path: Path, weight: float) -> None:
    _, done = run(write_both(tmp_path, "classification"), weight=weight, steps=2)
    assert not any(name in entry for entry in done.curve for name in METRICS)


@pytest.mark.parametrize(
    ("weight", "variant"),
    [
        (Pooled(), None),
        (Scheduled(LambdaSchedule(values=[0.5, 0.0]), 2), None),
        (Constant(0.3), TrainingVariant(lora_rank=2)),
    ],
    ids=["pooled", "a schedule that ends at 0", "lora"],
)
def test_every_way_of_mixing_is_measured(tmp_path: Path, weight: MixWeight, variant: TrainingVariant | None) -> None:
    folder = write_both(tmp_path, "classification")
    _, done = run(folder, weight=weight, variant=variant, steps=2, log_every_steps=2)
    (entry,) = done.curve
    if isinstance(weight, Scheduled):
        assert "grad_cosine" not in entry, "the measured step has λ = 0"
    else:
        assert -1 <= float(entry["grad_cosine"] or 0) <= 1


@pytest.mark.parametrize("steps", [1, 33, 34, 100, 120, 1000, 100_000])
def test_measurements_cost_what_is_stated(steps: int) -> None:
    assert 1 <= len(steps_to_measure(steps, False)) <= max(1, COST * steps)
    assert max(steps_to_measure(steps, False)) < steps
    assert len(steps_to_measure(steps, True)) <= max(1, steps / 10 + 1)


def test_a_lambda_of_the_gradient_gives_norms_in_its_ratio(tmp_path: Path) -> None:
    folder = write_both(tmp_path, "classification")
    weight = GradientScaled(Constant(0.3))
    _, done = run(folder, weight=weight, **NO_CHANGE)
    (entry,) = done.curve
    in_force = float(entry["realised_mix_weight"] or 0)
    assert entry["mix_weight"] == pytest.approx(in_force)
    assert entry["norm_share_pretrain"] == pytest.approx(0.3, rel=1e-4)
    assert in_force != pytest.approx(0.3, rel=0.1), "the norms differ, or this test shows nothing"


def test_norms_are_smoothed_and_what_is_no_norm_is_left_out() -> None:
    weight = GradientScaled(Constant(0.5))
    assert weight.at(0) == 0.5
    weight.observe_norms(3.0, 1.0)
    assert weight.at(0) == pytest.approx(0.25)
    for bad in (0.0, float("nan"), float("inf")):
        weight.observe_norms(bad, 1.0)
    assert weight.at(0) == pytest.approx(0.25)
    weight.observe_norms(6.0, 1.0)
    assert weight.state() == pytest.approx({"pretrain": 4.0, "finetune": 1.0})
    again = GradientScaled(Constant(0.5))
    again.restore(weight.state())
    assert again == weight
    assert GradientScaled(Constant(0.0), 3.0, 1.0).weights(0, 5, 4) == (0.0, 0.25)
