"""Loss and gradients behind the LM head, chunk by chunk: against the plain computation in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2Config, Gemma2ForCausalLM, GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM

from mixtune.components.shared.model import lm_loss
from mixtune.components.shared.model.lm_loss import can_be_chunked, chunked_losses, plain_head
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.training.lora import add_adapters

pytestmark = pytest.mark.numeric

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA: dict[str, Any] = {**SIZES, "intermediate_size": 16}


def drawn(seed: int, count: int, scale: float, dtype: torch.dtype) -> tuple[nn.Linear, Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    head = nn.Linear(12, 40, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(scale * torch.randn(40, 12, generator=draw))
    hidden = torch.randn(count, 12, generator=draw).to(dtype).requires_grad_()
    target = torch.randint(0, 40, (count,), generator=draw)
    text = torch.rand(count, generator=draw) < 0.5
    weight = torch.where(text, 0.3, 0.7).double() / max(count, 1)
    return head, hidden, target, weight, text


def plainly(head: nn.Linear, hidden: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w, h = head.weight.detach().double().requires_grad_(), hidden.detach().double().requires_grad_()
    loss = (F.cross_entropy(h @ w.T, target, reduction="none") * weight).sum()
    torch.autograd.backward(loss)
    assert h.grad is not None
    assert w.grad is not None
    return loss.detach(), h.grad, w.grad


def test_without_gradients_the_logits_alone_are_computed() -> None:
    head, hidden, target, weight, text = drawn(0, 30, 1.0, torch.float64)
    with FlopCounterMode(display=False) as with_gradients:
        expected = chunked_losses(head, hidden, target, weight, text)
    with torch.no_grad(), FlopCounterMode(display=False) as without:
        found = chunked_losses(head, hidden.detach(), target, weight, text)
    assert all(torch.equal(one, other.detach()) for one, other in zip(found, expected, strict=True))
    logits = 2 * 30 * 12 * 40
    assert (without.get_total_flops(), with_gradients.get_total_flops()) == (logits, 3 * logits)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(0, 40),
    chunk=st.integers(1, 50),
    tile=st.integers(1, 50),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    upstream=st.sampled_from([1.0, 3.0]),
)
def test_any_chunk_and_tile_gives_the_plain_loss_and_gradients(
    seed: int, count: int, chunk: int, tile: int, scale: float, upstream: float
) -> None:
    head, hidden, target, weight, text = drawn(seed, count, scale, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_loss, "_CPU_CHUNK_TOKENS", chunk)
        patch.setattr(lm_loss, "_CPU_TILE_ENTRIES", tile)
        weighted, pretrain, finetune = chunked_losses(head, hidden, target, weight, text)
        torch.autograd.backward(weighted * upstream)
    loss, of_hidden, of_head = plainly(head, hidden, target, weight)
    torch.testing.assert_close(weighted.detach(), loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(hidden.grad, upstream * of_hidden, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(head.weight.grad, upstream * of_head, rtol=1e-8, atol=1e-12)
    ce = F.cross_entropy(head(hidden), target, reduction="none")
    torch.testing.assert_close(pretrain, ce[text].sum().detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(finetune, ce[~text].sum().detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tile", [7, 40])
def test_in_bf16_the_loss_is_a_float32_and_the_gradients_are_no_worse_than_autocast_gives(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_loss, "_CPU_TILE_ENTRIES", tile)
    head, hidden, target, weight, text = drawn(3, 600, 1.0, torch.float32)
    loss, of_hidden, of_head = plainly(head, hidden, target, weight)
    other, hidden_of_other = copy.deepcopy(head), hidden.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        weighted, pretrain, finetune = chunked_losses(head, hidden, target, weight, text)
        plain = (F.cross_entropy(other(hidden_of_other).float(), target, reduction="none") * weight).sum()
    torch.autograd.backward(plain)
    torch.autograd.backward(weighted)
    assert weighted.dtype == pretrain.dtype == finetune.dtype == torch.float32
    assert float(weighted.detach()) == pytest.approx(float(loss), rel=1e-3)
    for ours, theirs, exact in (
        (hidden.grad, hidden_of_other.grad, of_hidden),
        (head.weight.grad, other.weight.grad, of_head),
    ):
        assert ours is not None
        assert theirs is not None
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()


@pytest.mark.parametrize("tile", [1, 2])
def test_near_certainty_bf16_does_not_lose_the_gradient(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_loss, "_CPU_TILE_ENTRIES", tile)
    head = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[8.0, 0.0], [0.0, 0.0]]))
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        weighted, _, _ = chunked_losses(head, hidden, torch.tensor([0]), torch.ones(1), torch.tensor([True]))
    torch.autograd.backward(weighted)
    assert hidden.grad is not None
    # 1 - p is 3.4e-4, which bf16 cannot tell from 0 beside 1.
    assert float(hidden.grad[0, 0]) == pytest.approx(-8 * 3.353e-4, rel=0.02)


def test_logits_that_are_not_finite_show_in_their_own_stream_alone() -> None:
    head, hidden, target, weight, text = drawn(1, 8, 1.0, torch.float32)
    with torch.no_grad():
        hidden[int(text.nonzero()[0])] = float("nan")
    weighted, pretrain, finetune = chunked_losses(head, hidden, target, weight, text)
    assert weighted.isnan()
    assert pretrain.isnan()
    assert finetune.isfinite()


def test_it_is_differentiated_once() -> None:
    head, hidden, target, weight, text = drawn(1, 8, 1.0, torch.float32)
    loss = chunked_losses(head, hidden, target, weight, text)[0]
    torch.autograd.backward(loss, retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.backward(loss)


def test_a_frozen_head_gets_no_gradient_and_measuring_computes_none() -> None:
    head, hidden, target, weight, text = drawn(1, 8, 1.0, torch.float32)
    head.weight.requires_grad_(False)
    torch.autograd.backward(chunked_losses(head, hidden, target, weight, text)[0])
    assert head.weight.grad is None
    assert hidden.grad is not None
    with torch.no_grad():
        assert not chunked_losses(head, hidden, target, weight, text)[0].requires_grad


def test_heads_that_do_more_than_one_product_are_told_apart() -> None:
    assert plain_head(LlamaForCausalLM(LlamaConfig(**LLAMA))) is not None
    capped = Gemma2Config(**LLAMA, head_dim=8, num_key_value_heads=2, final_logit_softcapping=30.0, pad_token_id=0)
    assert plain_head(Gemma2ForCausalLM(capped)) is None
    with_bias = GPTJConfig(vocab_size=96, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=32)
    assert plain_head(GPTJForCausalLM(with_bias)) is None


def test_what_was_put_in_the_place_of_the_head_is_noticed() -> None:
    model = MixedModel(LlamaForCausalLM(LlamaConfig(**LLAMA)))
    (head,) = model._plain
    assert head is not None
    assert can_be_chunked(model.lm, head)
    add_adapters(model, 2)
    assert can_be_chunked(model.lm, head), "adapters are on the backbone alone"
    other: Any = nn.Sequential(head)
    model.lm.set_output_embeddings(other)
    assert not can_be_chunked(model.lm, head)


def test_a_copied_model_uses_its_own_head() -> None:
    model = MixedModel(LlamaForCausalLM(LlamaConfig(**LLAMA)))
    twin = copy.deepcopy(model)
    assert twin._plain[0] is twin.lm.get_output_embeddings()
    assert twin._plain[0] is not model._plain[0]
