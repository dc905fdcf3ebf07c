"""The loop: trains for real, whatever the micro-batch, and leaves models that plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, OPTConfig

from mixtune.components.shared.config import Training
from mixtune.components.shared.data.prepared import Documents
from mixtune.components.shared.errors import MixtuneError, RefusedError
from mixtune.components.shared.model.loading import interpolate, load_model
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.training.loop import train
from mixtune.components.shared.training.mix_weight import Constant
from mixtune.components.shared.training.optimizer import is_task_head
from mixtune.components.shared.training.result import Result
from mixtune.components.shared.training.streams import FinetuneStream, Mix, PretrainStream, UnreadExamples, make_mix

from .compared import assert_same_movement, weights_of
from .tiny import tiny_model, tiny_tokenizer, weight_of, write_data

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("data")
    write_data(base / "text", "pretrain", None, count=40)
    write_data(base / "labels", "finetune", "classification", count=24)
    return base


def both(folder: Path, weight: float) -> Mix:
    text = PretrainStream(Documents(folder / "text", "train"), 32, 0) if weight > 0 else None
    examples = Documents(folder / "labels", "train")
    labels = FinetuneStream(examples, 0, "classification") if weight < 1 else None
    return make_mix(text, labels, 8, 32, 0.5, UnreadExamples(len(examples), len(examples.flat) / len(examples)))


def run(folder: Path, weight: float, steps: int = 6, **options: object) -> tuple[MixedModel, Result]:
    model = tiny_model(labels=["no", "yes"])
    values = {"learning_rate": 1e-2, "precision": "float32", "log_every_steps": 1, "steps": steps} | options
    training = Training.model_validate(values)
    return model, train(model, both(folder, weight), training, Constant(weight), 60, 0, Context.for_tests())


def test_both_losses_fall(folder: Path) -> None:
    _, result = run(folder, 0.5, steps=60)
    for name in ("loss_pretrain", "loss_finetune"):
        first, last = [sum(float(entry[name] or 0) for entry in part) for part in (result.curve[:8], result.curve[-8:])]
        assert last < 0.9 * first, name


@pytest.mark.usefixtures("plain_descent")
def test_the_micro_batch_does_not_change_the_result(folder: Path) -> None:
    options: dict[str, Any] = {
        "learning_rate": 0.02,
        "max_grad_norm": 1e3,
    }  # no clipping, which would hide a wrong factor
    whole, _ = run(folder, 0.3, micro_batch_size=64, **options)
    split, _ = run(folder, 0.3, micro_batch_size=1, **options)
    start = tiny_model(labels=["no", "yes"])
    assert_same_movement(weights_of(split), weights_of(whole), weights_of(start))


def test_the_same_seed_gives_the_same_weights_to_the_bit(folder: Path) -> None:
    one, _ = run(folder, 0.3)
    two, _ = run(folder, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_what_is_logged_adds_up(folder: Path) -> None:
    _, result = run(folder, 0.3)
    for entry in result.curve:
        assert entry["realised_mix_weight"] == pytest.approx(0.3, abs=1e-12)
        mixed = 0.3 * float(entry["loss_pretrain"] or 0) + 0.7 * float(entry["loss_finetune"] or 0)
        assert entry["loss"] == pytest.approx(mixed)
        assert 0 <= float(entry["padding_share"] or 0) < 0.5
    assert result.tokens["pretrain"] == sum(int(entry["tokens_pretrain"] or 0) for entry in result.curve)
    assert result.tokens["finetune"] > 0


@pytest.mark.parametrize(("weight", "untouched"), [(1.0, "task."), (0.0, "lm.lm_head.")])
def test_the_head_of_a_loss_without_weight_is_left_alone(folder: Path, weight: float, untouched: str) -> None:
    before = {name: value.clone() for name, value in tiny_model(labels=["no", "yes"]).named_parameters()}
    model, result = run(folder, weight, weight_decay=0.5)
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(untouched))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert result.realised_mix_weight == weight
    assert result.tokens["finetune" if weight == 1 else "pretrain"] == 0


def test_the_head_has_its_own_learning_rate(folder: Path) -> None:
    _, result = run(folder, 0.3, steps=1, head_learning_rate=0.5, schedule="constant")
    assert result.curve[0]["learning_rate"] == pytest.approx(1e-2)
    assert result.curve[0]["head_learning_rate"] == pytest.approx(0.5)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_lost(folder: Path) -> None:
    model = tiny_model(labels=["no", "yes"])
    with torch.no_grad():
        assert model.task is not None
        weight_of(model.task, "score.weight")[0, 0] = float("inf")
    training = Training(steps=3, precision="float32", learning_rate=1e-2)
    weights = dict(model.lm.named_parameters())
    before = {name: value.detach().clone() for name, value in weights.items()}
    with pytest.raises(MixtuneError, match=r"step 1: .*fine-tuning.*not finite"):
        train(model, both(folder, 0.3), training, Constant(0.3), 60, 0, Context.for_tests())
    assert all(torch.equal(before[name], value) for name, value in weights.items())


def test_interpolation_is_linear_in_the_weights(tmp_path: Path) -> None:
    start, end = tiny_model(seed=1), tiny_model(labels=["no", "yes"], seed=2)
    start.save(tmp_path / "start", tiny_tokenizer())
    end.save(tmp_path / "end", tiny_tokenizer())
    middle = interpolate(tmp_path / "start", tmp_path / "end", 0.25)
    for name, weight in middle.lm.state_dict().items():
        wanted = 0.75 * start.lm.state_dict()[name] + 0.25 * end.lm.state_dict()[name]
        torch.testing.assert_close(weight, wanted)
    assert middle.task is not None
    assert end.task is not None
    assert torch.equal(weight_of(middle.task, "score.weight"), weight_of(end.task, "score.weight"))


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"model\.base"):
        load_model(tmp_path)


def test_interpolation_moves_tied_weights_once(tmp_path: Path) -> None:
    models = []
    for seed in (1, 2):
        model = tiny_model("gpt2", seed=seed)
        assert model.lm.config.tie_word_embeddings
        model.save(tmp_path / str(seed), tiny_tokenizer())
        models.append(dict(model.lm.named_parameters()))
    middle = interpolate(tmp_path / "1", tmp_path / "2", 0.5)
    for name, weight in middle.lm.named_parameters():
        torch.testing.assert_close(weight, (models[0][name] + models[1][name]) / 2, msg=name)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
def test_interpolation_of_encoders_takes_the_whole_head_of_the_fine_tuned_one(
    tmp_path: Path, architecture: str
) -> None:
    start, end = tiny_model(architecture, seed=1), tiny_model(architecture, labels=["no", "yes"], seed=2)
    start.save(tmp_path / "start", tiny_tokenizer(ends=True))
    end.save(tmp_path / "end", tiny_tokenizer(ends=True))
    middle = dict(interpolate(tmp_path / "start", tmp_path / "end", 0.25).named_parameters())
    before, after = dict(start.named_parameters()), dict(end.named_parameters())
    assert middle.keys() == after.keys()
    for name, weight in middle.items():
        wanted = after[name] if is_task_head(name) else 0.75 * before[name] + 0.25 * after[name]
        torch.testing.assert_close(weight, wanted, msg=name)


@pytest.mark.parametrize("kind", ["mamba", "opt"])
def test_an_architecture_in_which_packed_documents_see_each_other_is_refused(tmp_path: Path, kind: str) -> None:
    config = {
        "mamba": MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4, initializer_range=0.5),
        "opt": OPTConfig(
            vocab_size=61, hidden_size=16, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=16,
            init_std=0.5,
        ),
    }[kind]  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(RefusedError, match="see each other"):
        load_model(tmp_path)
