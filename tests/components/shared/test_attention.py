"""Attention of bf16 models on a CPU: computed in float32, inside the block alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from mixtune.components.shared.attention import fast_attention
from mixtune.components.shared.model import MixedModel
from mixtune.components.shared.packing import Segment, collate

from .tiny import random_documents

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_packed_documents_stay_apart_and_the_gradients_are_no_worse(kind: str) -> None:
    exact_loss, exact = gradients(tiny(kind), low=False)
    _, plain = gradients(tiny(kind), low=True)
    lm = tiny(kind)
    other = tiny(kind)
    with fast_attention([lm, other], CPU, "bf16"):
        assert lm.config._attn_implementation == other.config._attn_implementation != "sdpa"
        loss, ours = gradients(lm, low=True)
    assert lm.config._attn_implementation == other.config._attn_implementation == "sdpa"
    assert loss == pytest.approx(exact_loss, rel=1e-2)
    assert (ours - exact).norm() < 1.1 * (plain - exact).norm()


@pytest.mark.parametrize(("precision", "attention"), [("float32", "sdpa"), ("bf16", "eager")])
def test_what_is_not_slow_stays_as_it_is(precision: str, attention: str) -> None:
    lm = tiny("causal")
    lm.set_attn_implementation(attention)
    with fast_attention([lm], CPU, precision):
        assert lm.config._attn_implementation == attention
