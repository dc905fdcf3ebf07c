"""`finetune`: λ = 0, the labelled data alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtune.components.shared.artifacts import ModelCard
from mixtune.components.shared.config import Objective, Task
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model.loading import load_model
from tests.components.stages import Stages

pytestmark = pytest.mark.numeric

CAUSAL: list[tuple[Objective, Task]] = [("causal_lm", "classification"), ("causal_lm", "generation")]
MASKED: list[tuple[Objective, Task]] = [
    ("masked_lm", task) for task in ("classification", "multi_label", "regression", "question_answering")
]


@pytest.mark.parametrize(("objective", "task"), [*CAUSAL, *MASKED])
def test_the_baseline_reads_no_text(tmp_path: Path, objective: Objective, task: Task) -> None:
    stages = Stages(tmp_path, task, objective)
    stages.pretrain()
    for file in (tmp_path / "text" / "train").iterdir():
        file.unlink()
    folder = stages.finetune()
    card = ModelCard.load(folder)
    assert (card.id, card.kind, card.start, card.mix_weight) == ("finetuned", "finetuned", "pretrained", 0.0)
    assert card.tokens["pretrain"] == 0
    assert card.tokens["finetune"] > 0
    assert card.has_task_head
    assert set(card.data) == {"pretrain", "finetune"}
    model = load_model(folder)
    assert (model.kind, model.objective) == (None if task == "generation" else task, objective)


def test_a_masked_language_model_generates_nothing(tmp_path: Path) -> None:
    stages = Stages(tmp_path, "generation", "masked_lm")
    stages.pretrain()
    with pytest.raises(RefusedError, match=r"data\.finetune\.task: is generation"):
        stages.finetune()
