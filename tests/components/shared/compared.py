"""How results of float computations are compared: by what is well conditioned, on every processor.

Gradients are compared tensor by tensor, by the norm of the difference over the norm. Weights are compared after plain gradient
descent, by how far they moved. AdamW is no way to compare weights: it divides a gradient by its own size, so it makes a whole
step of a gradient that is only rounding, and what rounding gives differs between processors and numbers of threads.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.optim import SGD, Optimizer

from mixtune.components.shared.checkpoints.resume import TrainingCheckpointer
from mixtune.components.shared.config import Training
from mixtune.components.shared.errors import MixtuneError
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.running import processes as distributed
from mixtune.components.shared.training import budget_search
from mixtune.components.shared.training import loop as training
from mixtune.components.shared.training.optimizer import make_optimizer

from .pair import serve

Tensors = Mapping[str, Tensor]

SHARE_OF_WHOLE = {torch.float32: 1e-2, torch.float64: 1e-3}
"""A tensor whose norm is below this share of all tensors' together is compared on that scale.

A gradient that is zero by the formula (of a key's bias, say) is what large numbers leave when they cancel: some 2e-8 of the
whole gradient in float32.
"""


def assert_close(found: Tensors, wanted: Tensors, tolerance: float, precision: torch.dtype | None = None) -> None:
    """Compares tensors by name.

    Args:
        found: as many tensors as are wanted, or more.
        wanted: the reference.
        tolerance: largest norm of a difference, relative to the norm of what is wanted.
        precision: that of the computation of `found`; by default the tensors' own.
    """
    norms = {name: float(torch.linalg.vector_norm(one.double())) for name, one in wanted.items()}
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    for name, one in wanted.items():
        error = float(torch.linalg.vector_norm(found[name].double() - one.double()))
        scale = max(norms[name], SHARE_OF_WHOLE[precision or found[name].dtype] * whole)
        assert error <= tolerance * scale, (name, error, scale)


def weights_of(model: MixedModel) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same_movement(found: Tensors, wanted: Tensors, start: Tensors, tolerance: float = 1e-4) -> None:
    """Compares weights by how far training moved them from where both started."""
    assert found.keys() == wanted.keys() == start.keys()
    moved, expected = ({name: one[name].double() - start[name].double() for name in start} for one in (found, wanted))
    assert any(bool(one.any()) for one in expected.values()), "nothing was trained"
    assert_close(moved, expected, tolerance, torch.float32)


ADAMW = "TESTS_ADAMW"
"""Environment variable: trainings keep their own optimizer."""
CUT_OFF_AFTER = "TESTS_CUT_OFF_AFTER"
"""Environment variable: trainings end with an error after this step and its checkpoint."""

LEAST_LIMIT = 5e-5
"""Nats per token; replaces the one of budgets, which adapters forget less than in a few steps of plain descent."""
NO_SPACE_IN = "TESTS_NO_SPACE_IN"
"""Environment variable: the rank whose checkpoints find no space."""


def gradient_descent(model: MixedModel, options: Training) -> Optimizer:
    """Plain gradient descent over the groups of `make_optimizer`."""
    if os.environ.get(ADAMW):
        return make_optimizer(model, options)
    names = ("params", "name", "lr", "weight_decay")
    groups = [{name: group[name] for name in names} for group in make_optimizer(model, options).param_groups]
    return SGD(groups, lr=options.learning_rate)


def cut_off(self: TrainingCheckpointer, done: int, counters: Any) -> None:
    """Does what `after_step` does, and ends the training where the environment says so."""
    after_step(self, done, counters)
    if os.environ.get(CUT_OFF_AFTER) == str(done):
        raise MixtuneError("cut off")


def write_data(self: HuggingFaceStorageWriter, *given: Any) -> Any:
    """Writes the process's part of a checkpoint, or fails where the environment says so."""
    if os.environ.get(NO_SPACE_IN) == os.environ["RANK"]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return written(self, *given)


if __name__ == "__main__":
    # A process of training steps in several, or under torchrun the command, that descends by the gradient alone.
    vars(training)["make_optimizer"] = gradient_descent
    vars(budget_search)["LEAST_LIMIT"] = LEAST_LIMIT
    written = HuggingFaceStorageWriter.write_data
    HuggingFaceStorageWriter.write_data = write_data  # type: ignore[assignment, method-assign]
    after_step = TrainingCheckpointer.after_step
    TrainingCheckpointer.after_step = cut_off  # type: ignore[method-assign]
    if sys.argv[1] == "serve":
        serve(Path(sys.argv[2]), distributed.run_process)
    else:
        from mixtune.pipelines.cli import main

        main()
