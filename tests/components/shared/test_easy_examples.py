"""FLOW: weights from the start model's loss on each labelled example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
from accelerate import Accelerator

from mixtune.components.shared.config import Task
from mixtune.components.shared.data.prepared import Documents
from mixtune.components.shared.model.packing import collate
from mixtune.components.shared.training.easy_examples import example_losses, flow_weights
from mixtune.components.shared.training.streams import FinetuneStream

from .tiny import tiny_model
from .trained import LENGTH, PAD, write_both

pytestmark = pytest.mark.numeric


def test_the_weight_falls_with_the_loss_and_is_1_over_e_at_the_median() -> None:
    losses = np.array([0.5, 1.0, 2.0, 4.0, 8.0])
    assert flow_weights(losses) == pytest.approx(np.exp(-losses / 2))
    assert flow_weights(np.zeros(3)) == pytest.approx(np.ones(3)), "nothing is hard"
    assert np.isnan(flow_weights(np.array([1.0, np.nan, 2.0]))).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("architecture", "task"),
    [("llama", "generation"), ("gpt2", "classification"), ("bert", "question_answering"), ("llama", "regression")],
)
def test_losses_are_the_means_over_each_example_alone(tmp_path: Path, architecture: str, task: Task) -> None:
    folder = write_both(tmp_path, task)
    model: Any = tiny_model(architecture, task=task)
    stream = FinetuneStream(Documents(folder / "labels", "train"), 0, task)
    found = example_losses(model, stream, Accelerator(cpu=True), LENGTH, 3, PAD)
    assert len(found) == len(stream)
    assert model.training
    model.eval()
    for index, loss in enumerate(found):
        batch = collate([[stream.segment(index)]], PAD)
        if task != "generation":
            wanted = model(batch, 0.0, 1.0)["finetune"]
        else:
            ids, first = batch.input_ids, stream.segment(index).supervised_from
            logits = model.lm(input_ids=ids).logits[0]
            wanted = F.cross_entropy(logits[first - 1 : -1], ids[0, first:])
        assert loss == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)
