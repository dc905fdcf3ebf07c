"""`pretrain`: from scratch, from a folder, and zero steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from mixtune.components.shared.artifacts import ModelCard, read_jsonl
from mixtune.components.shared.errors import RefusedError
from tests.components.stages import Stages


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


def test_zero_steps_bring_in_the_base_model_as_it_is(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    base = stages.pretrain()
    again = stages.pretrain(base=str(base), name="brought", steps=0)
    assert load_file(base / "model.safetensors").keys() == load_file(again / "model.safetensors").keys()
    assert (base / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    card = ModelCard.load(again)
    assert card.steps == 0
    assert card.mix_weight is None


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    one, two = stages.pretrain(name="one"), stages.pretrain(name="two")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusedError, match=r"model\.base"):
        Stages(tmp_path).pretrain(base=str(tmp_path / "empty"))
    assert not (tmp_path / "pretrained" / "mixtune.json").exists()
