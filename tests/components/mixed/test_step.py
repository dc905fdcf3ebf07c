"""`mixed`: both streams, and plain fine-tuning or pretraining at the ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtune.components.shared.artifacts import ModelCard, read_jsonl
from mixtune.components.shared.config import Objective, Task
from mixtune.components.shared.errors import RefusedError
from tests.components.stages import Stages

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize(
    ("objective", "task"),
    [
        ("causal_lm", "classification"),
        ("causal_lm", "generation"),
        ("masked_lm", "multi_label"),
        ("masked_lm", "question_answering"),
    ],
)
def test_both_streams_are_read(tmp_path: Path, objective: Objective, task: Task) -> None:
    stages = Stages(tmp_path, task, objective)
    stages.pretrain()
    folder = stages.mixed(0.3)
    card = ModelCard.load(folder)
    assert (card.id, card.kind, card.start, card.mix_weight) == ("mixed-0.3", "mixed", "pretrained", 0.3)
    assert card.realised_mix_weight == pytest.approx(0.3)
    assert min(card.tokens.values()) > 0
    curve = list(read_jsonl(folder / "training.jsonl"))
    assert all(entry["loss_pretrain"] > 0 and entry["loss_finetune"] > 0 for entry in curve)


def test_lambda_zero_is_fine_tuning_to_the_byte(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.pretrain()
    finetuned, mixed = stages.finetune(), stages.mixed(0.0)
    assert (finetuned / "model.safetensors").read_bytes() == (mixed / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("weight", "unread"), [(0.0, "text"), (1.0, "labels")])
def test_the_stream_without_weight_is_not_even_opened(tmp_path: Path, weight: float, unread: str) -> None:
    stages = Stages(tmp_path)
    stages.pretrain()
    for file in (tmp_path / unread / "train").iterdir():
        file.unlink()
    card = ModelCard.load(stages.mixed(weight))
    assert card.tokens["pretrain" if unread == "text" else "finetune"] == 0


def test_it_can_start_from_the_finetuned_model(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.pretrain()
    stages.finetune()
    assert ModelCard.load(stages.mixed(0.5, start="finetuned", folder="finetuned")).start == "finetuned"


def test_a_pipeline_compiled_for_another_start_is_refused(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.pretrain()
    with pytest.raises(RefusedError, match="compiled to start from pretrained"):
        stages.mixed(0.5, start="finetuned", folder="pretrained")
