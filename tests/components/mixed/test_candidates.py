"""`mixed` beyond one λ: schedules, forgetting budgets, pooling and the other controls, each through the whole step."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from mixtune.components.mixed.config import Mixed, MixedCandidate, candidate_id, candidates
from mixtune.components.shared.artifacts import ModelCard, read_jsonl
from mixtune.components.shared.checkpoints.resume import TrainingCheckpointer
from mixtune.components.shared.config import Budget, LambdaSchedule
from mixtune.components.shared.data.prepared import DataManifest, Documents
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.model.packing import width_of
from mixtune.components.shared.training import budget_search
from mixtune.components.shared.training.control import ControlText
from mixtune.components.shared.training.mix_weight import Scheduled
from mixtune.components.shared.training.streams import PretrainStream
from tests.components.shared.tiny import write_data
from tests.components.stages import Stages

pytestmark = pytest.mark.numeric

EVERY_STEP: dict[str, Any] = {"log_every_steps": 1, "steps": 12}


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    made = Stages(tmp_path)
    made.pretrain()
    return made


def curve_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / "training.jsonl"))


def budgeted(budget: float, **options: float) -> MixedCandidate:
    return MixedCandidate(
        id=f"mixed-budget-{budget:g}", forgetting_budget=budget, budget=Budget.model_validate(options)
    )


def in_nats(stages: Stages, budget: float) -> float:
    text = DataManifest.load(stages.folder / "text").splits["train"]
    never_predicted = text.documents * (2 if stages.objective == "masked_lm" else 1)
    return budget * math.log(2) * text.bytes / (text.tokens - never_predicted)


def test_a_schedule_is_what_the_loss_is_weighted_by(stages: Stages) -> None:
    schedule = LambdaSchedule(shape="cosine", values=[0.9, 0.1, 0.4])
    folder = stages.mixed(MixedCandidate(id="mixed-cosine", schedule=schedule), **EVERY_STEP)
    wanted = [Scheduled(schedule, 12).at(step) for step in range(12)]
    for column in ("mix_weight", "realised_mix_weight"):
        assert [entry[column] for entry in curve_of(folder)] == pytest.approx(wanted)
    card = ModelCard.load(folder)
    assert (card.id, card.mix_weight) == ("mixed-cosine", None)
    assert card.realised_mix_weight == pytest.approx(sum(wanted) / 12)


def test_pooling_weighs_all_tokens_alike(stages: Stages) -> None:
    folder = stages.mixed(MixedCandidate(id="mixed-pooled", pooled=True), **EVERY_STEP)
    for entry in curve_of(folder):
        counts = entry["supervised_pretrain"], entry["supervised_finetune"]
        assert entry["mix_weight"] is None
        assert entry["realised_mix_weight"] == pytest.approx(counts[0] / sum(counts))
    card = ModelCard.load(folder)
    assert card.mix_weight is None
    assert card.realised_mix_weight is not None
    assert 0.5 < card.realised_mix_weight < 1, "an example counts as one, a text as all its tokens"


@pytest.mark.parametrize("objective", ["causal_lm", "masked_lm"])
@pytest.mark.parametrize(("budget", "rises"), [(0.0, True), (5.0, False)])
def test_lambda_follows_from_what_is_forgotten(tmp_path: Path, objective: Any, budget: float, rises: bool) -> None:
    stages = Stages(tmp_path, objective=objective)
    stages.pretrain()
    # With a rate this high the model forgets, whatever λ is.
    folder = stages.mixed(budgeted(budget), learning_rate=0.1, **EVERY_STEP)
    card, curve = ModelCard.load(folder), curve_of(folder)
    assert (card.mix_weight, card.forgetting_budget) == (None, budget)
    tried = [one.mix_weight for one in card.tried]
    assert tried[0] == Budget().start_lambda
    assert tried == sorted(tried, reverse=not rises)
    assert len(tried) > 1
    assert rises or tried[-1] == 0
    assert all(one.forgetting > 0 for one in card.tried)
    assert [entry["mix_weight"] for entry in curve] == [tried[-1]] * 12, "the model is that of the last training"
    assert [entry["realised_mix_weight"] for entry in curve] == pytest.approx([tried[-1]] * 12)
    weights = (folder / "model.safetensors").read_bytes()
    tokens = [ModelCard.load(stages.mixed(weight, learning_rate=0.1, **EVERY_STEP)).tokens for weight in tried]
    assert card.tokens == {stream: sum(one[stream] for one in tokens) for stream in ("pretrain", "finetune")}
    if card.pull_back == 1:
        assert (stages.folder / "mixed" / "model.safetensors").read_bytes() == weights, "as with this λ alone"


def test_the_last_training_is_the_one_with_its_lambda(stages: Stages) -> None:
    budget = stages.mixed(budgeted(5.0, start_lambda=0.3, max_trainings=1), **EVERY_STEP)
    trained = (budget / "model.safetensors").read_bytes()
    assert ModelCard.load(budget).pull_back == 1
    assert (stages.mixed(0.3, **EVERY_STEP) / "model.safetensors").read_bytes() == trained


def test_trainings_to_a_budget_go_on_where_they_were_cut_off(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second of three. Another budget takes over the first training, and trains with another λ then."""
    options = {**EVERY_STEP, "learning_rate": 0.1, "checkpoint_steps": 4}
    whole = stages.mixed(budgeted(5.0), **options)
    expected, curve = (whole / "model.safetensors").read_bytes(), curve_of(whole)
    monkeypatch.setenv("MIXTUNE_CHECKPOINT_DIR", str(stages.folder / "checkpoints"))
    said: list[str] = []
    monkeypatch.setattr(stages.context, "say", said.append, raising=False)
    after_step, ended = TrainingCheckpointer.after_step, []

    def cut_off(self: TrainingCheckpointer, done: int, counters: Any) -> None:
        after_step(self, done, counters)
        ended.append(done)
        if len(ended) == 12 + 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingCheckpointer, "after_step", cut_off)
        with pytest.raises(KeyboardInterrupt):
            stages.mixed(budgeted(5.0), **options)
    again = stages.mixed(budgeted(5.0), **options)
    assert [line.rpartition(" ")[2] for line in said if "goes on from the checkpoint" in line] == ["12", "4"]
    assert (again / "model.safetensors").read_bytes() == expected
    assert [entry["loss"] for entry in curve_of(again)] == [entry["loss"] for entry in curve]
    said.clear()
    other = ModelCard.load(stages.mixed(budgeted(0.0), **options))
    assert [line.rpartition(" ")[2] for line in said if "goes on from the checkpoint" in line] == ["12"]
    assert other.tried[0] == ModelCard.load(again).tried[0]
    assert other.tried[1].mix_weight > 0.1


def test_training_to_a_budget_is_deterministic(stages: Stages) -> None:
    one = (stages.mixed(budgeted(0.01), **EVERY_STEP) / "model.safetensors").read_bytes()
    two = (stages.mixed(budgeted(0.01), **EVERY_STEP) / "model.safetensors").read_bytes()
    assert one == two


@torch.no_grad()
def forgetting_on_control_text(stages: Stages, model: Path) -> float:
    """Loss of a model on the control text less that of the pretrained one, in nats per token, by transformers alone."""
    text = PretrainStream(Documents(stages.folder / "text", "control"), 32, 0)
    sums, count = [], 0
    for lm in (load_model(model).lm, load_model(stages.folder / "pretrained").lm):
        total, count = 0.0, 0
        for segment in (segment for position in range(len(text)) for segment in text.item(position)):
            ids = torch.tensor(segment.tokens.tolist())[None]
            total += float(cross_entropy(lm(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
        sums.append(total)
    return (sums[0] - sums[1]) / count


def test_forgetting_is_the_rise_over_the_pretrained_model_on_control_text(stages: Stages) -> None:
    finetuned = stages.finetune(steps=20)
    with pytest.raises(RefusedError, match="pretrained: is required to measure forgetting"):
        stages.mixed(budgeted(0.1), start="finetuned", folder="finetuned")
    candidate, ends = budgeted(0.1, max_trainings=1), {"start": "finetuned", "folder": "finetuned"}
    adapters = candidate.model_copy(update=ADAPTERS | {"lora_merge": False})
    with pytest.raises(RefusedError, match="can be pulled back to the start model only"):
        stages.mixed(adapters, pretrained="pretrained", **ends)
    folder = stages.mixed(candidate, pretrained="pretrained", **ends, **EVERY_STEP | {"learning_rate": 1e-30})
    wanted = forgetting_on_control_text(stages, finetuned)
    assert abs(wanted) > 1e-3
    (once,) = ModelCard.load(folder).tried
    assert once.forgetting == pytest.approx(wanted / in_nats(stages, 1), abs=1e-5)


@pytest.mark.parametrize(
    ("task", "changes", "options"),
    [
        ("classification", {}, {}),
        ("classification", {"lora_rank": 2}, {}),
        ("generation", {}, {"micro_batch_size": 1}),
        ("regression", {}, {"gradient_checkpointing": True}),
    ],
)
def test_the_last_measurement_is_of_the_model_that_is_saved(
    tmp_path: Path, task: Any, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    stages = Stages(tmp_path, task)
    stages.pretrain()
    candidate = budgeted(5.0, max_trainings=2).model_copy(update=changes)
    trained = stages.mixed(candidate, **EVERY_STEP, **options)
    card, found = ModelCard.load(trained), forgetting_on_control_text(stages, trained) / in_nats(stages, 1)
    assert card.tried[-1].forgetting == pytest.approx(found, abs=1e-5)
    assert card.pull_back == 1


ADAPTERS: dict[str, Any] = {"lora_rank": 4, "learning_rate": 0.03}


@pytest.mark.parametrize("changes", [{}, ADAPTERS, ADAPTERS | {"lora_merge": False}])
def test_a_model_that_forgets_more_than_its_budget_is_pulled_back_to_it(
    stages: Stages, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_search, "LEAST_LIMIT", 5e-5)  # adapters this small forget little
    free = budgeted(5.0, start_lambda=0, max_lambda=0).model_copy(update=changes)
    found = forgetting_on_control_text(stages, stages.mixed(free, **EVERY_STEP))
    assert found > 0.001
    tight = free.model_copy(update={"forgetting_budget": found / in_nats(stages, 1) / 2})
    trained = stages.mixed(tight, **EVERY_STEP)
    assert 0 < (ModelCard.load(trained).pull_back or 0) < 1
    left = forgetting_on_control_text(stages, trained) / (found / 2)
    assert 0.48 <= left <= 1.02, "at least half of the budget, and not more than all of it"
    assert load_model(trained).task is not None


def test_without_control_text_a_budget_is_refused(stages: Stages) -> None:
    manifest = DataManifest.load(stages.folder / "text")
    manifest.model_copy(update={"splits": {"train": manifest.splits["train"]}}).save(stages.folder / "text")
    with pytest.raises(RefusedError, match="control_fraction: leaves no control text"):
        stages.mixed(budgeted(0.1))
    stages.mixed(0.3)


def test_measuring_costs_what_was_asked(tmp_path: Path) -> None:
    write_data(tmp_path, "pretrain", None, count=9000)
    stream = PretrainStream(Documents(tmp_path, "control"), 32, 0)
    whole = sum(width_of(stream.item(position)) for position in range(len(stream)))
    for tokens in (1000, 1_000_000, 100_000_000):
        control = ControlText.plan(stream, 0.05, tokens, 32, 60, 8)
        read, allowed = sum(map(width_of, control.windows)), max(0.05 * 3 * tokens / 2, 65_536)
        assert read == whole or allowed <= read < allowed + 32


@pytest.mark.parametrize("options", [{"epochs": 2.0}, {"max_tokens": 1500}, {"steps": 8}])
def test_more_pretraining_takes_as_many_tokens(stages: Stages, options: dict[str, Any]) -> None:
    totals = []
    for weight in (0.3, 1.0):
        card = ModelCard.load(stages.mixed(weight, **options))
        assert card.id == candidate_id(weight)
        totals.append(sum(card.tokens.values()))
    assert totals[1] == pytest.approx(totals[0], rel=0.15)


@pytest.mark.parametrize(
    ("options", "column"),
    [
        ({"lora_rank": 2, "learning_rate": 0.05}, None),
        ({"kl_weight": 0.5}, "kl"),
        ({"l2sp_weight": 0.1}, "l2sp"),
        ({"osf_share": 0.5}, None),
    ],
)
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_controls_are_trained_like_the_others(
    stages: Stages, weight: float, options: dict[str, Any], column: str | None
) -> None:
    folder = stages.mixed(MixedCandidate(id="control", name="a control", mix_weight=weight, **options), **EVERY_STEP)
    card, curve = ModelCard.load(folder), curve_of(folder)
    assert (card.id, card.name, card.mix_weight) == ("control", "a control", weight)
    assert card.params["candidate"] == {**({"mix_weight": weight}), **options}
    assert card.params["learning_rate"] == options.get("learning_rate", 1e-2)
    assert curve[0]["learning_rate"] == card.params["learning_rate"]
    assert (card.tokens["pretrain"] > 0) == (weight > 0)
    if column:
        assert curve[-1][column] > 0
    before, after = (load_model(one).lm.state_dict() for one in (folder, stages.folder / "pretrained"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_sampled_streams_have_lambda_in_expectation_only(stages: Stages) -> None:
    sampled = MixedCandidate(id="mixed-0.3-sampled", mix_weight=0.3, sampled=True)
    folder = stages.mixed(sampled, log_every_steps=1, steps=60, batch_size=8)
    curve = curve_of(folder)
    assert {entry["mix_weight"] for entry in curve} == {0.3}
    weights = [entry["realised_mix_weight"] for entry in curve]
    assert len(set(weights)) > 5
    assert min(weights) < 0.25
    assert max(weights) > 0.35
    assert sum(weights) / len(weights) == pytest.approx(0.3, abs=0.05)
    assert len({entry["supervised_finetune"] for entry in curve}) > 3, "the number of examples is drawn"


def test_flow_weighs_examples_by_the_start_models_loss(tmp_path: Path) -> None:
    stages = Stages(tmp_path, "generation")
    stages.pretrain(steps=20)
    candidate = MixedCandidate(id="mixed-0.3-flow", mix_weight=0.3, flow=True)
    flow, plain = (curve_of(stages.mixed(one, **EVERY_STEP)) for one in (candidate, 0.3))
    assert flow[0]["loss_finetune"] < plain[0]["loss_finetune"], "hard examples count less"
    assert flow[0]["loss_pretrain"] == pytest.approx(plain[0]["loss_pretrain"])
    assert [entry["realised_mix_weight"] for entry in flow] == pytest.approx([0.3] * 12)
    assert flow[0]["supervised_finetune"] == plain[0]["supervised_finetune"]


def test_flow_needs_a_start_model_that_can_do_the_task(stages: Stages) -> None:
    with pytest.raises(RefusedError, match=r"mixed-0-flow: .* has no trained head for classification"):
        stages.mixed(MixedCandidate(id="mixed-0-flow", mix_weight=0.0, flow=True))
    stages.finetune()
    flow = MixedCandidate(id="mixed-0-flow", mix_weight=0.0, flow=True)
    assert ModelCard.load(stages.mixed(flow, start="finetuned", folder="finetuned")).id == "mixed-0-flow"


def test_ids_of_candidates_are_file_names_and_differ() -> None:
    schedules = [{"shape": "steps", "values": [0.5, 0.1], "starts": [0, start]} for start in (0.3, 0.5, 0.7)]
    ids = [one.id for one in candidates(Mixed.model_validate({"lambdas": [], "lambda_schedules": schedules}))]
    assert ids == ["mixed-steps-0.5-0.1-at-0-0.3", "mixed-steps-0.5-0.1", "mixed-steps-0.5-0.1-at-0-0.7"]
    assert all(re.fullmatch(r"[\w.+-]+", name) for name in ids), "which is what a task's title is read by"


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValidationError, match="there is no candidate"):
        Mixed.model_validate({"lambdas": []})


def test_adapters_have_their_rate_and_the_head_keeps_its_own(stages: Stages) -> None:
    folder = stages.mixed(
        MixedCandidate(id="mixed-0-lora-2", mix_weight=0.0, lora_rank=2, learning_rate=0.1),
        schedule="constant",
        **EVERY_STEP,
    )
    for entry in curve_of(folder):
        assert entry["learning_rate"] == pytest.approx(0.1)
        assert entry["head_learning_rate"] == pytest.approx(1e-2), "as of the other candidates"


def test_pretraining_alone_leaves_no_head_that_nothing_trained(stages: Stages) -> None:
    folder = stages.mixed(MixedCandidate(id="mixed-1", mix_weight=1.0), **EVERY_STEP)
    assert load_model(folder).task is None
    assert not ModelCard.load(folder).has_task_head


def test_replay_shares_are_crossed_with_what_reads_both_streams(stages: Stages) -> None:
    asked = {
        "lambdas": [0, 0.3],
        "forgetting_budgets": [0.05],
        "replay_shares": [0.1, 0.6],
        "controls": {"pooled": True},
    }
    made = list(candidates(Mixed.model_validate(asked)))
    assert [one.id for one in made] == [
        "mixed-0", "mixed-0.3-replay-0.1", "mixed-0.3-replay-0.6", "mixed-budget-0.05-replay-0.1",
        "mixed-budget-0.05-replay-0.6", "mixed-pooled",
    ]  # fmt: skip
    shares = []
    for candidate in made[1:3]:
        card = ModelCard.load(stages.mixed(candidate))
        assert card.params["replay_share"] == candidate.replay_share
        shares.append(card.tokens["pretrain"] / sum(card.tokens.values()))
    assert shares == pytest.approx([0.1, 0.6], abs=0.06)
    with pytest.raises(ValidationError, match="several candidates"):
        Mixed.model_validate({"lambdas": [0.3], "replay_shares": [0.1, 0.1]})


def test_further_seeds_train_every_candidate_again(stages: Stages) -> None:
    mixed = Mixed.model_validate({"lambdas": [0.3], "controls": {"pooled": True}, "seeds": [5, 7, 5]})
    listed = list(candidates(mixed))
    assert [one.id for one in listed] == [
        "mixed-0.3", "mixed-pooled", "finetuned-seed-5", "mixed-0.3-seed-5", "mixed-pooled-seed-5",
        "finetuned-seed-7", "mixed-0.3-seed-7", "mixed-pooled-seed-7",
    ]  # fmt: skip
    assert listed[3].name == "mixed, λ = 0.3, seed 5"

    def weights(seed: int | None) -> torch.Tensor:
        folder = stages.mixed(MixedCandidate(id="mixed-0.3", mix_weight=0.3, seed=seed))
        return torch.cat([weight.detach().flatten() for weight in load_model(folder).parameters()])

    first, same, other = weights(None), weights(0), weights(5)
    assert torch.equal(first, same), "the configuration's seed is 0"
    assert not torch.equal(first, other)


@pytest.mark.parametrize("start", ["pretrained", "finetuned"])
def test_fine_tuning_alone_with_another_seed_is_fine_tuning(stages: Stages, start: str) -> None:
    """With the same seed it is the same model, whatever the mixed candidates start from."""
    finetuned = stages.finetune()
    again = MixedCandidate(id="finetuned-seed-0", mix_weight=0.0, seed=0, alone=True)
    folder = stages.mixed(again, start=start, folder=start, pretrained=None if start == "pretrained" else "pretrained")
    weights = [dict(load_model(one).named_parameters()) for one in (finetuned, folder)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert ModelCard.load(folder).start == "pretrained"


def test_with_the_gradient_scale_lambda_is_a_share_in_the_norm(stages: Stages) -> None:
    folder = stages.mixed(0.3, scale="gradient", **EVERY_STEP)
    first, *rest = curve_of(folder)
    assert first["norm_share_pretrain"] == pytest.approx(0.3, rel=1e-4)
    assert {entry["mix_weight"] for entry in rest[:9]} == {rest[0]["mix_weight"]}, "the next measurement is at step 11"
    assert ModelCard.load(folder).mix_weight == 0.3, "as it is configured"
    for unscaled in (MixedCandidate(id="mixed-pooled", pooled=True), 0.0):
        with_option = curve_of(stages.mixed(unscaled, scale="gradient", **EVERY_STEP))
        without = curve_of(stages.mixed(unscaled, **EVERY_STEP))
        assert [entry["loss"] for entry in with_option] == [entry["loss"] for entry in without]
    named = {
        one.id: one.name for one in candidates(Mixed(lambdas=[0.0, 0.3], scale="gradient", forgetting_budgets=[0.1]))
    }
    assert named["mixed-0.3"] == "mixed, λ = 0.3 of the gradient norm"
    assert not any("norm" in name for candidate, name in named.items() if candidate != "mixed-0.3")
