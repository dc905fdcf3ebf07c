"""`finetune`: λ = 0, the labelled data alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtune.components.shared.artifacts import ModelCard
from mixtune.components.shared.model import load_model
from tests.components.stages import Stages


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_the_baseline_reads_no_text(tmp_path: Path, task: str) -> None:
    stages = Stages(tmp_path, task)
    stages.pretrain()
    folder = stages.finetune()
    card = ModelCard.load(folder)
    assert (card.id, card.kind, card.start, card.mix_weight) == ("finetuned", "finetuned", "pretrained", 0.0)
    assert card.tokens["pretrain"] == 0
    assert card.tokens["finetune"] > 0
    assert card.has_task_head
    assert set(card.data) == {"pretrain", "finetune"}
    assert (load_model(folder).head is not None) == (task == "classification")
