"""bf16 models on a CPU: what is computed in float32 there, inside the block alone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch._functorch.config as functorch_config
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from mixtune.components.shared.model import bf16_on_cpu, lm_loss
from mixtune.components.shared.model.bf16_on_cpu import fast_bf16
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import Segment, collate

from .tiny import random_documents

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")


def test_auto_is_float32_where_onednn_may_not_use_the_instructions() -> None:
    command = "from mixtune.components.shared.model.precision import pick_precision; print(pick_precision('auto'))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == "float32"


def tiny(kind: str) -> PreTrainedModel:
    set_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    if kind == "encoder":
        return BertForMaskedLM(BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    return LlamaForCausalLM(LlamaConfig(**sizes))


def gradients(lm: PreTrainedModel, low: bool) -> tuple[float, torch.Tensor]:
    model = MixedModel(lm)
    segments = []
    for tokens in random_documents(6, 3, low=4):
        if model.objective == "causal_lm":
            segments.append(Segment(tokens, 1, pretrain=True))
        else:
            segments.append(Segment(tokens, 1, pretrain=True, masked=np.array([0, 2]), originals=tokens[[0, 2]]))
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        losses = model(collate([segments[:3], segments[3:]], 0), 0.1, 0.0)
    torch.autograd.backward(losses["weighted"])
    grads = [parameter.grad.flatten() for parameter in lm.parameters() if parameter.grad is not None]
    return float(losses["pretrain"]), torch.cat(grads)


@pytest.fixture(params=[True, False], ids=["with-instructions", "without"])
def has_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A processor that has instructions for bf16 or none, whichever this is."""
    has = bool(request.param)
    for module in (bf16_on_cpu, lm_loss):
        monkeypatch.setattr(module, "has_bf16_products", lambda: has)
    return has


@pytest.mark.usefixtures("has_products")
@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_packed_documents_stay_apart_and_the_gradients_are_no_worse(kind: str) -> None:
    exact_loss, exact = gradients(tiny(kind), low=False)
    _, plain = gradients(tiny(kind), low=True)
    lm = tiny(kind)
    other = tiny(kind)
    with fast_bf16([lm, other], CPU, "bf16"):
        assert lm.config._attn_implementation == other.config._attn_implementation != "sdpa"
        loss, ours = gradients(lm, low=True)
    assert lm.config._attn_implementation == other.config._attn_implementation == "sdpa"
    assert loss == pytest.approx(exact_loss, rel=1e-2)
    assert 0 < (ours - exact).norm() < 1.1 * (plain - exact).norm()


@pytest.mark.parametrize(("precision", "attention"), [("float32", "sdpa"), ("bf16", "eager")])
def test_what_is_not_slow_stays_as_it_is(precision: str, attention: str) -> None:
    lm = tiny("causal")
    lm.set_attn_implementation(attention)
    with fast_bf16([lm], CPU, precision):
        assert lm.config._attn_implementation == attention


@pytest.mark.usefixtures("has_products")
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_rounded_numbers_rounded(bias: bool) -> None:
    lm = tiny("causal")
    layer = lm.model.layers[0].mlp.up_proj
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(layer.out_features))
    x = torch.randn(5, layer.in_features)
    plain = layer(x)
    with fast_bf16([lm], CPU, "bf16"):
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
        assert torch.equal(layer(x), plain)  # outside of autocast nothing is rounded
    numbers = [x, layer.weight, layer.bias if layer.bias is not None else torch.zeros(layer.out_features)]
    rounded = [one.detach().bfloat16().double() for one in numbers]
    exact = rounded[0] @ rounded[1].t() + rounded[2]
    assert found.dtype == torch.bfloat16
    # One rounding: half a unit in the last of eight binary digits.
    assert torch.allclose(found.double(), exact, rtol=2**-8 * 1.001, atol=1e-6)
    assert "forward" not in vars(layer)


def test_without_gradients_attention_is_changed_only_where_there_are_no_instructions(has_products: bool) -> None:
    lm = tiny("causal")
    with fast_bf16([lm], CPU, "bf16", backward=False):
        assert (lm.config._attn_implementation == "sdpa") == has_products
        assert ("forward" in vars(lm.lm_head)) == (not has_products)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_layers_are_changed_only_where_it_helps_and_no_longer_than_that(precision: str, has_products: bool) -> None:
    lm = tiny("causal")
    layer = lm.model.layers[0].mlp.up_proj
    changed = precision == "bf16" and not has_products
    before = functorch_config.backward_pass_autocast
    with contextlib.suppress(ValueError), fast_bf16([lm, lm], CPU, precision):
        assert ("forward" in vars(layer)) == changed
        assert functorch_config.backward_pass_autocast == ("off" if changed else before)
        raise ValueError
    assert "forward" not in vars(layer)
    assert functorch_config.backward_pass_autocast == before
