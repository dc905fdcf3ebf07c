"""A training that is watched on held-out data: the same weights, measurements that are right, and an early stop."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mixtune.components.mixed.config import MixedCandidate
from mixtune.components.shared.artifacts import ModelCard, read_jsonl
from mixtune.components.shared.checkpoints.store import CHECKPOINT_DIR
from mixtune.components.shared.config import Task, Watch
from mixtune.components.shared.data.prepared import WATCH, DataManifest, Documents
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.training.variant import TrainingVariant
from mixtune.components.shared.training.watching import Watcher
from tests.components.stages import Stages

from .cut_off import CutOffError, Training, curve, equal
from .tiny import ENCODERS, tiny_masking, tiny_model
from .trained import LENGTH, run, write_both

pytestmark = pytest.mark.numeric

FAST: dict[str, Any] = {"steps": 8, "schedule": "constant", "learning_rate": 0.05}
"""A training that forgets more with every step."""


def watched(
    task: Task, architecture: str = "gpt2", lora_rank: int | None = None, **options: Any
) -> Callable[[MixedModel, Path], TrainingVariant]:
    """Makes the variant of a training that is watched."""
    masking = tiny_masking() if architecture in ENCODERS else None

    def variant(model: MixedModel, folder: Path) -> TrainingVariant:
        watch = Watch.model_validate({"every_steps": 2} | options)
        watcher = Watcher.load(str(folder / "labels"), watch, task, masking, LENGTH)
        return TrainingVariant(watch=watcher, lora_rank=lora_rank)

    return variant


@pytest.mark.parametrize(
    ("task", "architecture", "lora_rank"),
    [
        ("classification", "gpt2", None),
        ("generation", "gpt2", 2),
        ("question_answering", "bert", None),
        ("regression", "roberta", None),
    ],
)
def test_watching_changes_no_bit_of_the_training(
    tmp_path: Path, task: Task, architecture: str, lora_rank: int | None
) -> None:
    plain = Training(
        tmp_path / "plain", task, architecture, make_variant=lambda *_: TrainingVariant(lora_rank=lora_rank)
    )
    measured = Training(tmp_path / "watched", task, architecture, make_variant=watched(task, architecture, lora_rank))
    (model, expected), (other, found) = plain.run(), measured.run()
    assert equal(model, other)
    entries = curve(found)
    assert [entry for entry in entries if "loss" in entry] == curve(expected)
    steps = [entry["step"] for entry in entries if "watch_forgetting" in entry]
    assert steps == [0, 2, 4, 6, 8]
    assert entries[0]["watch_forgetting"] == 0.0
    assert all(entry["watch_loss_finetune"] > 0 for entry in entries if "watch_forgetting" in entry)


def test_forgetting_is_the_rise_of_the_loss_on_the_control_text(tmp_path: Path) -> None:
    folder = write_both(tmp_path, "classification")
    before = tiny_model(task="classification")
    variant = watched("classification", every_steps=6)(before, folder)
    after, result = run(folder, weight=0.0, variant=variant)
    before = tiny_model(task="classification")
    pieces, manifest = Documents(folder / "labels" / WATCH, "control"), DataManifest.load(folder / "labels" / WATCH)
    rise, predicted = 0.0, 0
    for index in range(len(pieces)):
        tokens = torch.from_numpy(np.array(pieces.tokens(index), np.int64))[None]
        for sign, model in ((1, after), (-1, before)):
            logits = model.lm.eval()(tokens).logits[0, :-1]
            rise += sign * float(F.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        predicted += len(pieces.tokens(index)) - 1
    text = manifest.splits["control"]
    expected = rise / predicted * text.tokens / text.bytes / math.log(2)
    last = [entry for entry in result.curve if "watch_forgetting" in entry][-1]
    assert last["step"] == 6
    assert last["watch_forgetting"] == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 1e-3


def test_a_training_that_forgets_too_much_stops_with_the_weights_of_that_step(tmp_path: Path) -> None:
    stopping = watched("classification", max_forgetting=0.0, patience=2)
    stopped = Training(tmp_path / "stopped", weight=0.0, make_variant=stopping, log_every_steps=3, **FAST)
    model, result = stopped.run()
    assert result.stopped is not None
    assert (result.steps, result.stopped.step, result.stopped.planned_steps) == (4, 4, 8)
    assert len(result.stopped.forgetting) == 2
    assert "after step 4 of 8" in stopped.lines[-1]
    assert result.curve[-1]["step"] == 4
    assert result.curve[-1]["loss"] is not None, "the last step is logged"
    assert result.realised_mix_weight == 0
    short = Training(tmp_path / "short", weight=0.0, **FAST | {"steps": 4})
    assert equal(model, short.run()[0])


@pytest.mark.parametrize("cut_off_after", [3, 5])
def test_a_watched_training_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_off_after: int
) -> None:
    """It is cut off before it stops, and never gets to the second of these steps."""
    stopping = watched("classification", max_forgetting=0.0, patience=2)
    training = Training(tmp_path, weight=0.0, make_variant=stopping, **FAST)
    monkeypatch.setenv(CHECKPOINT_DIR, "")
    model, whole = training.run()
    monkeypatch.setenv(CHECKPOINT_DIR, str(tmp_path / "checkpoints"))
    if cut_off_after < whole.steps:
        with pytest.raises(CutOffError):
            training.run(cut_off_after)
    else:  # the process ends after the stop, before the model is written
        training.run()
        assert list((tmp_path / "checkpoints").glob("*/step-00000004*"))
    other, resumed = training.run()
    assert any("goes on from the checkpoint" in line for line in training.lines)
    assert equal(model, other)
    assert curve(resumed) == curve(whole)
    assert resumed.stopped == whole.stopped


def test_forgetting_that_falls_or_is_within_the_limit_does_not_stop(tmp_path: Path) -> None:
    folder = write_both(tmp_path, "classification")
    watcher = watched("classification", max_forgetting=0.1, patience=3)(tiny_model(), folder).watch
    assert watcher is not None

    def stops(*found: float) -> bool:
        return watcher.stops([{"step": number, "watch_forgetting": value} for number, value in enumerate(found)])

    assert stops(0, 0.2, 0.25, 0.3)
    assert stops(0, 0.0, 0.2, 0.2, 0.2)
    assert not stops(0, 0.2, 0.3), "too few measurements"
    assert not stops(0, 0.2, 0.3, 0.25), "it falls"
    assert not stops(0, 0.2, 0.1, 0.3), "within the limit once"
    watcher.limit = None
    assert not stops(0, 9, 9, 9)


class Watched(Stages):
    watch = Watch(every_steps=1, max_forgetting=0.0, patience=1)


def test_what_is_stopped_and_what_forgetting_is_measured_against(tmp_path: Path) -> None:
    """Fine-tuning alone and budgets are not stopped; a candidate that starts fine-tuned has forgotten something already."""
    stages = Watched(tmp_path)
    stages.pretrain()
    finetuned = stages.finetune(learning_rate=0.1)
    assert ModelCard.load(finetuned).stopped is None
    candidate = MixedCandidate(id="mixed-0", mix_weight=0.0)
    mixed = stages.mixed(candidate, "finetuned", "finetuned", pretrained="pretrained", learning_rate=0.1)
    card = ModelCard.load(mixed)
    assert card.stopped is not None
    assert card.steps == card.stopped.step < card.stopped.planned_steps
    before, *_ = read_jsonl(mixed / "training.jsonl")
    last = [entry for entry in read_jsonl(finetuned / "training.jsonl") if "watch_forgetting" in entry][-1]
    assert before["step"] == 0
    assert before["watch_forgetting"] == pytest.approx(last["watch_forgetting"], rel=1e-5)
    assert before["watch_loss_finetune"] == pytest.approx(last["watch_loss_finetune"], rel=1e-5)
    budget = MixedCandidate(id="mixed-budget-0.01", forgetting_budget=0.01)
    assert ModelCard.load(stages.mixed(budget, learning_rate=0.1)).stopped is None


def test_without_a_sample_of_text_the_step_refuses(tmp_path: Path) -> None:
    stages = Watched(tmp_path)
    stages.pretrain()
    folder = tmp_path / "labels" / WATCH
    manifest = DataManifest.load(folder)
    manifest.model_copy(update={"splits": {"dev": manifest.splits["dev"]}}).save(folder)
    with pytest.raises(RefusedError, match=r"watch\.every_steps: .*control_fraction"):
        stages.finetune()
    shutil.rmtree(folder)
    with pytest.raises(RefusedError, match=r"watch: is missing; .* prepare it again"):
        stages.finetune()
    stages.watch = Watch()
    assert ModelCard.load(stages.finetune()).steps == 4, "by default, no sample is read"
