"""What ties a training to the model that it starts from: gradients against naive references, and what a large weight does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mixtune.components.shared.config import Task
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import collate
from mixtune.components.shared.training.mix_weight import split
from mixtune.components.shared.training.optimizer import is_task_head
from mixtune.components.shared.training.reference_models import ReferenceModel
from mixtune.components.shared.training.variant import TrainingVariant

from .compared import assert_close, weights_of
from .test_loss import PAIRS, Gradients, Streams, make_streams, reference
from .tiny import tiny_model
from .trained import run, write_both

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("data"), "classification")


def divergence(model: MixedModel, start: MixedModel, streams: Streams) -> torch.Tensor:
    """Mean of KL(start || model) over the tokens of the labelled examples, by transformers and by hand."""
    found = []
    for segment in streams.finetune:
        given: dict[str, torch.Tensor] = {"input_ids": torch.as_tensor(segment.tokens)[None]}
        if segment.second_from >= 0 and model.takes_token_types and model.objective == "masked_lm":
            given["token_type_ids"] = (torch.arange(len(segment.tokens)) >= segment.second_from).long()[None]
        ours, theirs = (one.lm(**given).logits[0] for one in (model, start))
        chance = theirs.softmax(-1).detach()
        found += list((chance * (chance.log() - ours.softmax(-1).log())).sum(-1))
    return torch.stack(found).mean()


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    pair=st.sampled_from(PAIRS), seed=st.integers(0, 99), text=st.integers(0, 4), labels=st.integers(1, 5),
    weight=st.floats(0, 1), penalty=st.floats(0.1, 10), size=st.integers(1, 4),
)  # fmt: skip
def test_the_gradient_of_the_divergence_is_the_formulas(
    pair: tuple[str, Task], seed: int, text: int, labels: int, weight: float, penalty: float, size: int
) -> None:
    architecture, task = pair
    model = tiny_model(architecture, task=task, seed=seed).double()
    other = tiny_model(architecture, task=task, seed=seed + 1).double()
    streams = make_streams(seed, text, labels, architecture, task)
    wanted = reference(model, streams, weight)
    model.zero_grad()
    torch.autograd.backward(penalty * divergence(model, other, streams))
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            wanted[name] = wanted.get(name, torch.zeros_like(parameter)) + parameter.grad
    # Two backward passes here, one there; some norms compute in float32 whatever they are given.
    assert_close(ours(model, ReferenceModel(other), streams, weight, penalty, size), wanted, 1e-5)


def ours(
    model: MixedModel, start: ReferenceModel, streams: Streams, weight: float, penalty: float, size: int
) -> Gradients:
    """As the training loop does: text and labels in rows of their own, the start model on the labelled rows alone."""
    model.zero_grad()
    data = Streams(streams.pretrain, streams.finetune).data(packed=False)
    tokens = sum(len(segment.tokens) for segment in streams.finetune)
    for rows in data.share(0, 1, size):
        labelled = [row for row in rows if not row[0].pretrain]
        logits = start.finetune_logits(collate(labelled, 60)) if labelled else None
        weights = split(weight, data.num_pretrain, data.num_finetune)
        torch.autograd.backward(model(collate(rows, 60), *weights, penalty / tokens, logits)["weighted"])
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_without_weight_nothing_changes(folder: Path, architecture: str) -> None:
    plain, curve = run(folder, architecture=architecture)
    start = ReferenceModel(tiny_model(architecture, task="classification", seed=9))
    tied, other = run(folder, architecture=architecture, variant=TrainingVariant(start=start))
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), tied.parameters(), strict=True))
    assert all("kl" not in entry and "l2sp" not in entry for entry in (*curve.curve, *other.curve))


def on_labels(model: MixedModel, start: MixedModel) -> float:
    with torch.no_grad():
        return float(divergence(model.eval(), start.eval(), make_streams(1, 0, 12, "llama", "classification")))


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_with_a_large_weight_the_model_goes_on_saying_the_same(folder: Path, weight: float) -> None:
    found = []
    for penalty in (0.0, 1e4):
        model = tiny_model(task="classification")
        start = ReferenceModel(model)
        variant = TrainingVariant(start=start, kl_weight=penalty)
        _, result = run(folder, weight=weight, variant=variant, model=model, steps=40, learning_rate=3e-3)
        found.append(on_labels(model, start.model))
        if penalty:
            logged = [float(entry["kl"] or 0) for entry in result.curve if "kl" in entry]
            assert len(logged) >= 39
            assert min(logged) > -1e-6, "it is zero at the least, but for rounding"
            assert float(result.curve[0].get("kl") or 0) == pytest.approx(0, abs=1e-6), "it starts from the start"
    assert found[1] < 0.05 * found[0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "modernbert"])
def test_the_pull_is_the_gradient_of_the_squared_distance(architecture: str) -> None:
    model = tiny_model(architecture, task="classification", seed=1).double()
    start = tiny_model(architecture, task="classification", seed=2).double()
    streams = make_streams(3, 3, 3, architecture, "classification")
    wanted = reference(model, streams, 0.3)
    reference_model = ReferenceModel(start)
    squared = 0.0
    for name, parameter in model.named_parameters():
        if not is_task_head(name):
            away = parameter.detach() - dict(start.named_parameters())[name].detach()
            wanted[name] = wanted[name] + 0.7 * away
            squared += float(away.square().sum())
    assert reference(model, streams, 0.3).keys() == wanted.keys()
    penalty = reference_model.pull(model, 0.7)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_close(found, wanted, 1e-12)
    assert penalty == pytest.approx(0.35 * squared, rel=1e-12)
    assert all(parameter.grad is None for parameter in start.parameters())


def test_with_a_large_pull_the_weights_stay(folder: Path) -> None:
    before = weights_of(tiny_model(task="classification"))
    moved = []
    for weight in (0.0, 1e3):
        model = tiny_model(task="classification")
        variant = TrainingVariant(start=ReferenceModel(model), l2sp_weight=weight)
        _, result = run(folder, variant=variant, model=model, steps=40, learning_rate=3e-3, weight_decay=0)
        after = weights_of(model)
        moved.append(sum(float((after[name] - before[name]).square().sum()) for name in before if "task" not in name))
        if weight:
            assert result.curve[0].get("l2sp", 0.0) == 0.0
            assert float(result.curve[-1]["l2sp"] or 0) > 0
    assert moved[1] < 0.1 * moved[0]


def test_an_anchor_is_not_trained(folder: Path) -> None:
    model = tiny_model(task="classification")
    reference_model = ReferenceModel(model)
    before = weights_of(reference_model.model)
    run(
        folder,
        model=model,
        variant=TrainingVariant(start=reference_model, kl_weight=0.5, l2sp_weight=0.5),
    )
    assert all(torch.equal(value, before[name]) for name, value in reference_model.model.named_parameters())
    assert not torch.equal(model.lm.lm_head.weight, reference_model.model.lm.lm_head.weight)
