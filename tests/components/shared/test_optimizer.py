"""Learning rates: layer by layer, of the head, over time; and how many steps a training has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtune.components.shared.config import Task, Training
from mixtune.components.shared.data.prepared import Documents
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.training.lora import add_adapters
from mixtune.components.shared.training.optimizer import is_task_head, learning_rates, make_optimizer, make_schedule
from mixtune.components.shared.training.streams import FinetuneStream, PretrainStream, UnreadExamples, make_mix

from .tiny import ARCHITECTURES, ENCODERS, tiny_model, write_data
from .trained import run, settings_of, write_both

pytestmark = pytest.mark.numeric

EMBEDDINGS = ("embed_tokens", ".wte.", ".wpe.", ".embeddings.")
LAYERS = ("layers", "h", "layer")


def rates_of(model: MixedModel, **options: object) -> dict[str, float]:
    """Peak learning rate of each trained parameter; each must be in one group."""
    optimizer = make_optimizer(model, settings_of(learning_rate=1.0, **options))
    rates = [(id(p), float(group["lr"])) for group in optimizer.param_groups for p in group["params"]]
    assert len(dict(rates)) == len(rates)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names.keys() == dict(rates).keys()
    return {names[number]: rate for number, rate in rates}


def wanted_rate(name: str, decay: float) -> float:
    """By hand, for the two layers that the tiny models have."""
    if any(f".{word}.0." in name for word in LAYERS):
        return decay
    if any(f".{word}.1." in name for word in LAYERS):
        return 1.0
    return decay**2 if any(word in name for word in EMBEDDINGS) else 1.0


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ENCODERS])
def test_each_layer_learns_more_slowly_than_the_one_above(architecture: str, adapted: bool) -> None:
    model = tiny_model(architecture, task="classification")
    if adapted:
        add_adapters(model, 2)
    rates = rates_of(model, layer_decay=0.5, head_learning_rate=0.7)
    assert any(is_task_head(name) for name in rates)
    for name, rate in rates.items():
        assert rate == (0.7 if is_task_head(name) else wanted_rate(name, 0.5)), name
    levels = {rate for name, rate in rates.items() if not is_task_head(name)}
    assert levels == ({1.0, 0.5} if adapted else {1.0, 0.5, 0.25})
    if adapted:
        assert all("lora_" in name or is_task_head(name) for name in rates)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ENCODERS])
def test_without_decay_all_of_the_backbone_has_one_rate(architecture: str) -> None:
    rates = rates_of(tiny_model(architecture, task="classification"))
    assert set(rates.values()) == {1.0}, "the head's rate is the backbone's where none is given"
    optimizer = make_optimizer(tiny_model(architecture), settings_of(learning_rate=1.0))
    assert {group["name"] for group in optimizer.param_groups} == {"backbone"}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ENCODERS])
def test_weight_decay_is_on_matrices_only(architecture: str) -> None:
    model = tiny_model(architecture, task="classification")
    optimizer = make_optimizer(model, settings_of(weight_decay=0.3, layer_decay=0.9))
    for group in optimizer.param_groups:
        assert group["weight_decay"] in (0.0, 0.3)
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] > 0}


def test_what_is_frozen_is_in_no_group() -> None:
    model = tiny_model()
    model.lm.base_model.requires_grad_(False)
    assert all("lm_head" in name for name in rates_of(model))


def course(steps: int, **options: object) -> list[float]:
    """Learning rate of each step, of a peak of 1."""
    training = settings_of(learning_rate=1.0, **options)
    optimizer = make_optimizer(tiny_model(), training)
    schedule = make_schedule(optimizer, training, steps)
    found = []
    for _ in range(steps):
        found.append(learning_rates(optimizer)["learning_rate"])
        optimizer.step()
        schedule.step()
    return found


AFTER_WARM_UP: dict[str, Callable[[float, int], float]] = {
    "constant": lambda done, _: 1.0,
    "linear": lambda done, _: 1 - done,
    "cosine": lambda done, _: (1 + math.cos(math.pi * done)) / 2,
    "inverse_sqrt": lambda _, step: math.sqrt(10 / step),
}


@pytest.mark.parametrize("schedule", AFTER_WARM_UP)
def test_schedules_rise_and_then_have_their_shape(schedule: str) -> None:
    found = course(50, schedule=schedule, warmup_steps=10)
    assert found[:10] == pytest.approx([step / 10 for step in range(10)])
    shape = AFTER_WARM_UP[schedule]
    assert found[10:] == pytest.approx([shape((step - 10) / 40, step) for step in range(10, 50)])


def test_warmup_stable_decay_falls_in_the_last_fifth() -> None:
    found = course(50, schedule="warmup_stable_decay", warmup_steps=10)
    assert found[:10] == pytest.approx([step / 10 for step in range(10)])
    assert found[10:40] == [1.0] * 30
    falling = found[40:]
    assert sorted(falling, reverse=True) == falling
    assert falling[0] > 0.9
    assert falling[-1] < 0.1


@pytest.mark.parametrize("schedule", [*AFTER_WARM_UP, "warmup_stable_decay"])
def test_without_warm_up_the_first_step_has_the_peak(schedule: str) -> None:
    assert course(20, schedule=schedule)[0] == pytest.approx(1.0)


def test_the_head_follows_the_same_course() -> None:
    training = settings_of(learning_rate=0.3, head_learning_rate=0.9, layer_decay=0.5, schedule="linear")
    optimizer = make_optimizer(tiny_model(task="classification"), training)
    schedule = make_schedule(optimizer, training, 10)
    for step in range(10):
        rates = learning_rates(optimizer)
        left = 1 - step / 10
        assert rates == pytest.approx(
            {"learning_rate": 0.3 * left, "lowest_learning_rate": 0.075 * left, "head_learning_rate": 0.9 * left}
        )
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("warmup_steps", [4, 9])
def test_warm_up_must_end_before_the_training_does(tmp_path: Path, warmup_steps: int) -> None:
    folder = write_both(tmp_path, "classification")
    with pytest.raises(RefusedError, match=rf"warmup_steps: must be below the 4 steps .*, found {warmup_steps}"):
        run(folder, steps=4, warmup_steps=warmup_steps)
    assert run(folder, steps=4, warmup_steps=3)[1].steps == 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return Documents(write_data(tmp_path_factory.mktemp("text"), "pretrain", None, count=300), "train")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Documents]:
    folder, found = tmp_path_factory.mktemp("labelled"), {}
    for count in (1, 7, 24, 31):
        found[count] = Documents(write_data(folder / str(count), "finetune", "generation", count=count), "train")
    return found


@settings(max_examples=60, deadline=None)
@given(
    epochs=st.integers(1, 4), count=st.sampled_from([1, 7, 24, 31]), batch_size=st.integers(1, 40), mixed=st.booleans()
)
def test_an_epoch_shows_every_example_once(
    text: Documents, labelled: dict[int, Documents], epochs: int, count: int, batch_size: int, mixed: bool
) -> None:
    stream = FinetuneStream(labelled[count], 0, "generation")
    what = make_mix(PretrainStream(text, 32, 0) if mixed else None, stream, batch_size, 32, 0.5)
    steps = what.steps(Training(epochs=epochs))
    assert steps == -(-epochs * count // batch_size)
    keys = [segment.key for position in range(steps * batch_size) for segment in stream.item(position)]
    seen = [s.key for step in range(steps) for row in what.step(step).rows for s in row if not s.pretrain]
    assert Counter(seen) == Counter(keys)
    for epoch in range(epochs):
        assert sorted(keys[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(epochs=st.sampled_from([0.1, 0.3, 0.5, 0.7, 1.5, 2.0]), batch_size=st.sampled_from([1, 2, 3, 8]))
def test_parts_of_an_epoch_are_rounded_up_to_whole_steps(
    labelled: dict[int, Documents], epochs: float, batch_size: int
) -> None:
    what = make_mix(None, FinetuneStream(labelled[24], 0, "generation"), batch_size, 32)
    tenths = round(10 * epochs) * 24
    assert what.steps(Training(epochs=epochs)) == -(-tenths // (10 * batch_size))


@given(epochs=st.integers(1, 3), batch_size=st.integers(1, 20))
def test_an_epoch_of_text_holds_every_token_once(text: Documents, epochs: int, batch_size: int) -> None:
    stream = PretrainStream(text, 32, 0)
    steps = make_mix(stream, None, batch_size, 32).steps(Training(epochs=epochs))
    assert steps == -(-epochs * len(stream) // batch_size)


@settings(max_examples=8, deadline=None)
@given(batch_size=st.integers(4, 16), share=st.floats(0.2, 0.8), limit=st.integers(3000, 12_000))
def test_max_tokens_is_the_number_of_tokens_seen(
    text: Documents, labelled: dict[int, Documents], batch_size: int, share: float, limit: int
) -> None:
    examples = FinetuneStream(labelled[31], 0, "generation")
    unread = UnreadExamples(len(examples), examples.mean_length)
    tasks: dict[str, tuple[Any, Any]] = {
        "both": (PretrainStream(text, 32, 0), examples),
        "text": (PretrainStream(text, 32, 0), None),
        "labels": (None, examples),
    }
    steps = {}
    for name, (pretrain, finetune) in tasks.items():
        what = make_mix(pretrain, finetune, batch_size, 32, share, unread)
        steps[name] = what.steps(Training(max_tokens=limit))
        data = [what.step(step) for step in range(steps[name])]
        seen = sum(one.tokens_pretrain + one.tokens_finetune for one in data)
        # Without its text a step is shorter, but there are as many steps: all candidates see the labels as often.
        wanted = limit * (1 - share) if name == "labels" else limit
        assert seen == pytest.approx(wanted, rel=0.06, abs=what.mean_tokens)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("options", [{"epochs": 3.0}, {"max_tokens": 8000}, {"steps": 40}])
def test_pretraining_alone_takes_as_many_tokens_as_both_streams(
    text: Documents, labelled: dict[int, Documents], share: float, options: dict[str, Any]
) -> None:
    examples = FinetuneStream(labelled[31], 0, "generation")
    stream, training = PretrainStream(text, 32, 0), Training.model_validate(options)
    totals = []
    for finetune in (examples, None):
        what = make_mix(stream, finetune, 8, 32, share, UnreadExamples(len(examples), examples.mean_length))
        data = [what.step(step) for step in range(what.steps(training))]
        totals.append(sum(one.tokens_pretrain + one.tokens_finetune for one in data))
        assert finetune is not None or all(one.num_finetune == 0 for one in data)
    assert totals[1] == pytest.approx(totals[0], rel=0.15)


@pytest.mark.parametrize(("weight", "task"), [(1.0, "classification"), (0.0, "multi_label"), (0.4, "regression")])
@pytest.mark.parametrize("architecture", ["llama", "bert", "modernbert"])
def test_only_what_has_a_loss_is_trained(tmp_path: Path, architecture: str, weight: float, task: Task) -> None:
    before = {name: value.clone() for name, value in tiny_model(architecture, task=task).named_parameters()}
    model, _ = run(write_both(tmp_path, task), task, architecture, weight, weight_decay=0.5, learning_rate=1e-2)
    after = dict(model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    alone = {  # what only the language model has; ModernBERT's task classes begin with its `head`
        name for name in before if name.startswith(("lm.lm_head", "lm.cls", "lm.decoder", "lm.head"))
    } - ({"lm.head.dense.weight", "lm.head.norm.weight"} if weight == 0 else set())
    left = {name for name in before if is_task_head(name)} if weight == 1 else alone if weight == 0 else set()
    # What is added to all keys changes no attention, so the gradient of their bias is only rounding, which may be zero.
    by_rounding = {name for name in before if name.endswith("key.bias")}
    # No document here is of two parts, and a padding token is never read.
    assert before.keys() - changed - by_rounding == left
