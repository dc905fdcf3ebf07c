"""Options that save time or memory give the same weights as without them."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from mixtune.components.shared.config import Task
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.training.reference_models import ReferenceModel
from mixtune.components.shared.training.variant import TrainingVariant

from .compared import assert_same_movement, weights_of
from .tiny import ARCHITECTURES, ENCODERS, tiny_model
from .trained import run, settings_of, write_both

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("data"), "classification")


def assert_same_training(one: MixedModel, other: MixedModel, architecture: str) -> None:
    start = tiny_model(architecture, task="classification")
    assert_same_movement(weights_of(one), weights_of(other), weights_of(start))


@pytest.mark.usefixtures("plain_descent")
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ENCODERS])
def test_checkpointing_gives_the_same_weights(folder: Path, architecture: str) -> None:
    plain, _ = run(folder, architecture=architecture, learning_rate=0.1)
    less_memory, _ = run(folder, architecture=architecture, learning_rate=0.1, gradient_checkpointing=True)
    assert_same_training(less_memory, plain, architecture)
    assert not less_memory.lm.is_gradient_checkpointing


@pytest.mark.usefixtures("plain_descent")
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ENCODERS])
def test_eager_attention_gives_the_same_weights(folder: Path, architecture: str) -> None:
    plain, _ = run(folder, architecture=architecture, learning_rate=0.1)
    eager = tiny_model(architecture, task="classification", attention="eager")
    assert eager.config._attn_implementation == "eager"
    run(folder, architecture=architecture, model=eager, learning_rate=0.1, attention="eager")
    assert_same_training(eager, plain, architecture)


@pytest.mark.slow
@pytest.mark.usefixtures("plain_descent")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("architecture", "variant"), [("llama", TrainingVariant(lora_rank=2)), ("bert", None)])
def test_a_compiled_backbone_gives_the_same_weights(
    folder: Path, architecture: str, variant: TrainingVariant | None
) -> None:
    plain, _ = run(folder, architecture=architecture, variant=variant, learning_rate=0.1)
    compiled, _ = run(folder, architecture=architecture, variant=variant, learning_rate=0.1, compile=True)
    assert_same_training(compiled, plain, architecture)
    assert compiled.lm.base_model._compiled_call_impl is None


@pytest.mark.usefixtures("plain_descent")
@pytest.mark.parametrize(
    ("architecture", "task"), [("llama", "generation"), ("gpt2", "classification"), ("bert", "question_answering")]
)
def test_bf16_is_near_float32(tmp_path: Path, architecture: str, task: Task) -> None:
    folder = write_both(tmp_path, task)
    curves = {}
    for precision in ("float32", "bf16"):
        model = tiny_model(architecture, task=task)
        variant = TrainingVariant(start=ReferenceModel(model), kl_weight=0.1)
        model, result = run(
            folder, task, architecture, model=model, variant=variant, precision=precision, learning_rate=0.1
        )
        assert result.precision == precision
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        curves[precision] = result.curve
    for one, other in zip(curves["float32"], curves["bf16"], strict=True):
        for name in ("loss_pretrain", "loss_finetune", "grad_norm"):
            assert float(other[name] or 0) == pytest.approx(float(one[name] or 0), rel=0.05, abs=0.02), name
    assert curves["float32"][0]["loss_pretrain"] != curves["bf16"][0]["loss_pretrain"], "it is not float32 after all"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that trains with it")
def test_flex_attention_without_a_gpu_is_refused_before_training() -> None:
    with pytest.raises(RefusedError, match="flex_attention has no backward pass on the CPU"):
        tiny_model("llama").set_attention("flex_attention")


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="it is installed")
def test_an_attention_that_is_not_to_be_had_is_refused_in_one_sentence() -> None:
    with pytest.raises(RefusedError) as refused:
        tiny_model("gpt2").set_attention("flash_attention_2")
    assert "\n" not in str(refused.value)
    assert "open an issue" not in str(refused.value)


def test_an_attention_for_bf16_alone_is_refused_with_float32() -> None:
    with pytest.raises(ValidationError, match="set precision to bf16, or attention to sdpa"):
        settings_of(attention="flash_attention_2", precision="float32")
