"""Gradients of every objective and head, on packed rows of both streams, against a naive float64 reference on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch

from mixtune.components.shared.config import Task
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.precision import autocast
from tests.components.shared.compared import assert_close
from tests.components.shared.test_loss import PAIRS, Gradients, make_streams, ours, reference
from tests.components.shared.tiny import tiny_model

from .bounds import BF16, FLOAT32
from .conftest import ALL

CHOSEN = PAIRS if ALL else [("llama", "generation"), ("bert", "question_answering")]
WEIGHT = 0.3


def gradients(
    architecture: str, task: Task, device: torch.device, attention: str = "auto"
) -> tuple[MixedModel, Gradients]:
    """A model on the device, and the gradient of its mixed loss as the float64 reference gives it."""
    model = tiny_model(architecture, task=task, seed=5)
    exact = tiny_model(architecture, task=task, seed=5).double()
    return model.to(device), reference(exact, make_streams(5, 6, 6, architecture, task), WEIGHT)


def largest_error(found: Gradients, wanted: Gradients) -> float:
    """Of all tensors that are not small, the norm of the difference over the norm."""
    whole = sum(float(one.double().square().sum()) for one in wanted.values()) ** 0.5
    norms = {name: float(one.double().norm()) for name, one in wanted.items()}
    return max(
        float((found[name].double() - wanted[name]).norm()) / max(norm, 1e-2 * whole) for name, norm in norms.items()
    )


@pytest.mark.parametrize(("precision", "bound"), [("float32", FLOAT32), ("bf16", BF16)])
@pytest.mark.parametrize(("architecture", "task"), CHOSEN)
def test_the_error_is_that_of_the_precision(
    device: torch.device,
    record: Callable[..., None],
    architecture: str,
    task: Task,
    precision: Literal["float32", "bf16"],
    bound: float,
) -> None:
    model, wanted = gradients(architecture, task, device)
    with autocast(device, precision):
        found = ours(model, make_streams(5, 6, 6, architecture, task), WEIGHT, 3, True, 2)
    moved = {name: gradient.cpu() for name, gradient in found.items()}
    error = largest_error(moved, wanted)
    record(error=error)
    assert precision == "float32" or error > FLOAT32, "it was not computed in bf16"
    assert_close(moved, wanted, bound)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_plain_fine_tuning_and_pretraining_are_the_ends_of_the_same_loss(device: torch.device, weight: float) -> None:
    streams = make_streams(3, 4, 4, "llama", "generation")
    alone = type(streams)(streams.pretrain, []) if weight else type(streams)([], streams.finetune)
    model = tiny_model("llama", task="generation", seed=3)
    wanted = reference(tiny_model("llama", task="generation", seed=3).double(), alone, weight)
    found = ours(model.to(device), alone, weight, 2, True, 1)
    assert_close({name: gradient.cpu() for name, gradient in found.items()}, wanted, FLOAT32)
