"""Task heads compute in float32, also behind a backbone in bf16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mixtune.components.evaluate.likelihood import batches, head_logits
from mixtune.components.shared.config import Task
from mixtune.components.shared.model.packing import Segment, collate
from mixtune.components.shared.model.precision import autocast
from mixtune.components.shared.running.context import Context

from .test_loss import PAIRS
from .tiny import random_documents, tiny_model
from .trained import example, run, write_both

pytestmark = pytest.mark.numeric

WITH_HEAD = [pair for pair in PAIRS if pair[1] != "generation"]


@pytest.mark.parametrize(("architecture", "task"), WITH_HEAD, ids=lambda value: str(value))
def test_a_head_behind_a_bf16_backbone_is_exact(architecture: str, task: Task) -> None:
    model = tiny_model(architecture, task=task).eval()
    rows = [[example(task, tokens)] for tokens in random_documents(6, 5)]
    batch = collate(rows, 60)
    with torch.no_grad(), autocast(model.device, "bf16"):
        hidden = model.hidden(batch)
        ours = model.task_logits(hidden, batch)
    with torch.no_grad():
        exact = model.task_logits(hidden.float(), batch)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_numbers_far_from_zero_stay_apart_in_bf16(tmp_path: Path, architecture: str) -> None:
    """In bf16, all numbers from 998 to 1,002 would be 1,000. Heads of causal models have no bias.

    Two of 24 float32 numbers near 1,000 may be equal by chance.
    """
    model, result = run(write_both(tmp_path, "regression"), "regression", architecture, precision="bf16")
    assert result.precision == "bf16"
    assert model.task is not None
    biases = [weight for name, weight in model.task.named_parameters() if name == "classifier.bias"]
    for bias in biases:
        bias.data.fill_(1000.0)
    segments = [Segment(tokens, len(tokens), key=key) for key, tokens in enumerate(random_documents(24, 9, low=8))]
    found = {}
    for precision in ("float32", "bf16"):
        model.precision = precision
        progress = Context.for_tests().progress(1, "batches")
        logits = head_logits(model.eval(), batches(segments, 32, 4), 60, progress)
        found[precision] = np.array([logits[key][0] for key in range(len(segments))])
    assert len(biases) == (architecture == "bert")
    assert not biases or found["float32"].min() > 900
    assert len(set(found["bf16"].tolist())) > len(segments) - 4
    assert np.corrcoef(found["float32"], found["bf16"])[0, 1] > 0.99
