"""`pretrain`: from scratch, from a folder, and zero steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixtune.components.evaluate.config import EvaluateStep
from mixtune.components.evaluate.step import run as run_evaluate
from mixtune.components.shared.artifacts import Artifact, ModelCard, read_jsonl
from mixtune.components.shared.config import Objective
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model.loading import interpolate, load_model
from mixtune.components.shared.running.context import Context
from tests.components.shared.tiny import tiny_lm
from tests.components.stages import Stages

pytestmark = pytest.mark.numeric


def test_from_scratch_leaves_a_whole_model_folder(tmp_path: Path) -> None:
    folder = Stages(tmp_path).pretrain()
    assert {"config.json", "model.safetensors", "tokenizer.json", "mixtune.json", "training.jsonl"} <= {
        path.name for path in folder.iterdir()
    }
    card = ModelCard.load(folder)
    assert (card.id, card.kind, card.mix_weight, card.steps, card.has_task_head) == (
        "pretrained",
        "pretrained",
        1.0,
        4,
        False,
    )
    assert card.tokens["pretrain"] > 0
    assert card.tokens["finetune"] == 0
    assert card.base.startswith("scratch")
    assert [entry["step"] for entry in read_jsonl(folder / "training.jsonl")] == [2, 4]


def test_zero_steps_copy_nothing(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    base = stages.pretrain(name="base")
    brought = stages.pretrain(base=str(base), steps=0)
    assert list(brought.rglob("*.safetensors")) == []
    card = ModelCard.load(brought)
    assert (card.steps, card.mix_weight, card.weights) == (0, None, str(base))
    wanted = load_file(base / "model.safetensors")
    found = load_model(brought).lm.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_what_zero_steps_bring_in_is_trained_and_measured_like_any_model(tmp_path: Path) -> None:
    copied, brought = Stages(tmp_path / "copied"), Stages(tmp_path / "brought")
    base = copied.pretrain()
    brought.pretrain(base=str(base), steps=0)
    for train in (Stages.finetune, lambda stages: stages.mixed(0.3)):
        one, other = train(copied), train(brought)
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
        card = ModelCard.load(other)
        assert (card.start, card.weights) == ("pretrained", None)
    middle = interpolate(tmp_path / "brought" / "pretrained", tmp_path / "brought" / "finetuned", 0.0)
    start = dict(load_model(base).lm.named_parameters())
    assert all(torch.equal(weight, start[name]) for name, weight in middle.lm.named_parameters())
    evaluated = evaluate(tmp_path / "brought", "pretrained"), evaluate(tmp_path / "copied", "pretrained")
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]) == 24


def evaluate(folder: Path, name: str) -> list[dict[str, Any]]:
    """Losses of the held-out documents."""
    config = EvaluateStep(max_length=32, metric="accuracy", max_new_tokens=None, batch_size=8, max_tokens=None)
    run_evaluate(
        config, context=Context.for_tests(), model=Artifact(str(folder / name)), other=None,
        pretrain_heldout=Artifact(str(folder / "text")), finetune_heldout=Artifact(str(folder / "labels")),
        evaluation=Artifact(str(folder / "evaluation")), metrics=Artifact(str(folder / "numbers")),
        classification=Artifact(str(folder / "classification")),
    )  # fmt: skip
    return list(read_jsonl(folder / "evaluation" / name / "dev.documents.jsonl"))


def test_zero_steps_can_bring_in_what_zero_steps_brought_in(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    base = stages.pretrain(name="base")
    once = stages.pretrain(base=str(base), name="once", steps=0)
    stages.pretrain(base=str(once), steps=0)
    assert ModelCard.load(stages.finetune()).base == "once"


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("objective", ["causal_lm", "masked_lm"])
def test_a_head_that_the_base_model_brings_is_not_taken_over(tmp_path: Path, steps: int, objective: Objective) -> None:
    stages = Stages(tmp_path, objective=objective)
    stages.pretrain()
    base = stages.finetune(name="base")
    assert load_model(base).task is not None
    pretrained = load_model(stages.pretrain(base=str(base), steps=steps))
    assert (pretrained.task, pretrained.kind, pretrained.labels) == (None, None, None)
    assert not [name for name, _ in pretrained.named_parameters() if "pooler" in name]
    stages.finetune()
    stages.mixed(0.3)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_base_model_without_a_language_model_head_must_be_trained(tmp_path: Path, architecture: str) -> None:
    stages = Stages(tmp_path)
    backbone: Any = tiny_lm(architecture).base_model
    backbone.save_pretrained(tmp_path / "base")
    with pytest.raises(RefusedError, match=r"pretrain\.steps: is 0, but .* has no trained language-model head"):
        stages.pretrain(base=str(tmp_path / "base"), steps=0)
    assert not (tmp_path / "pretrained" / "mixtune.json").exists()
    assert ModelCard.load(stages.pretrain(base=str(tmp_path / "base"), steps=2)).steps == 2


def test_a_masked_language_model_from_scratch(tmp_path: Path) -> None:
    stages = Stages(tmp_path, objective="masked_lm")
    folder = stages.pretrain(steps=3)
    model = load_model(folder)
    assert (model.objective, model.config.model_type) == ("masked_lm", "bert")
    curve = list(read_jsonl(folder / "training.jsonl"))
    assert all(0 < entry["supervised_pretrain"] < entry["tokens_pretrain"] for entry in curve)


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    one, two = stages.pretrain(name="one"), stages.pretrain(name="two")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusedError, match=r"model\.base"):
        Stages(tmp_path).pretrain(base=str(tmp_path / "empty"))
    assert not (tmp_path / "pretrained" / "mixtune.json").exists()
