"""The mixed loss behind the LM head: loss and gradients of a few hundred tokens at a time, in place.

The weight of every token in the loss is known before the forward pass, and so is the gradient of its logits,
w_i · (softmax(z_i) - onehot(y_i)). So the gradients are computed while a chunk's logits are still in the cache; logits of all
supervised tokens together never exist, and the backward pass has nothing left to do. The idea is that of Liger's fused
linear cross-entropy (arXiv:2410.10989). PyTorch's `linear_cross_entropy` does the same for one weight over all tokens, and
gives a bf16 model's sum in bf16, three digits, which is too coarse to log or to steer λ by.

Shapes: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from .heads import HiddenStates, on_hidden

# On a CPU, enough rows for a fast matrix product; on a GPU, as many as keep the launches few.
_CPU_CHUNK_TOKENS = 256
_GPU_CHUNK_LOGITS = 2**26


@torch.no_grad()
def plain_head(lm: PreTrainedModel) -> nn.Linear | None:
    """The LM head, where it is one matrix and nothing else: no bias, no transform before it, no cap or scale behind it."""
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.is_meta:
        return None
    # Large values, so that a cap on the logits shows.
    some = 100 * torch.linspace(-1, 1, 2 * head.in_features, dtype=head.weight.dtype, device=head.weight.device)
    hidden = some.view(2, head.in_features)
    try:
        logits = on_hidden(lm, HiddenStates(hidden[None])).logits[0]
    except Exception:  # a head that wants more than hidden states is none of these
        return None
    return head if torch.equal(logits, head(hidden)) else None


def can_be_chunked(lm: PreTrainedModel, head: nn.Linear) -> bool:
    """Whether it still is that layer: adapters replace it, and weights that are spread over ranks cannot be read here."""
    return lm.get_output_embeddings() is head and type(head.weight) is nn.Parameter


def chunked_losses(
    head: nn.Linear, hidden_NH: Tensor, target_N: Tensor, weight_N: Tensor, is_pretrain_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ w_i · ce_i, and Σ ce_i of each stream, in nats.

    Args:
        head: the LM head, as `plain_head` found it.
        hidden_NH: hidden states that predict.
        target_N: what they predict.
        weight_N: w_i.
        is_pretrain_N: whether a token belongs to the pretraining stream.

    Returns:
        Three scalars in float32 (float64 for a model in float64); only the first can be differentiated, and only once.
    """
    kind = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    with torch.autocast(kind, enabled=False):
        weighted, ce_N = _ChunkedLoss.apply(hidden_NH, head.weight, target_N, weight_N, dtype)  # type: ignore[no-untyped-call]
    return weighted, ce_N[is_pretrain_N].sum(), ce_N[~is_pretrain_N].sum()


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, weight_N: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        with_hidden, with_head = ctx.needs_input_grad[:2]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        hidden, head = hidden_NH.to(dtype), head_VH.to(dtype)
        weight_N = weight_N.to(wide)
        ce_N = torch.empty(len(target_N), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden_NH) if with_hidden else None
        grad_head: Tensor | None = None
        for start in range(0, len(target_N), _chunk_tokens(head)):
            at = slice(start, start + _chunk_tokens(head))
            h, target, weight = hidden[at], target_N[at, None], weight_N[at, None]
            z = F.linear(h, head)
            z_target = z.gather(1, target).to(wide)
            # log Σ exp(z) from the largest logit alone: its probability is at least 1/V, so that the logarithm is exact.
            top, top_at = z.max(1, keepdim=True)
            p = torch.softmax(z, 1, dtype=wide)
            log_sum = top.to(wide) - p.gather(1, top_at).log()
            ce_N[at] = (log_sum - z_target)[:, 0]
            if not (with_hidden or with_head):
                continue
            g = p.to(dtype)
            # In the wide format: near certainty, p - 1 is a small difference of large numbers.
            g.scatter_(1, target, ((z_target - log_sum).exp() - 1).to(dtype))
            if grad_hidden is not None:
                grad_hidden[at] = (g @ head).to(wide) * weight
            if with_head:
                # w_i in the wide format, since the same rounding of all of a stream's weights would be another λ.
                part = g.t() @ (h.to(wide) * weight).to(dtype)
                grad_head = part.to(head_VH.dtype) if grad_head is None else grad_head.add_(part)
        if with_head and grad_head is None:
            grad_head = torch.zeros_like(head_VH)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(ce_N)
        return (ce_N * weight_N).sum(), ce_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        # Almost always 1; on a GPU asking would mean to wait for it.
        unit = upstream.device.type == "cpu" and bool(upstream == 1)
        scaled = [one if one is None or unit else one * upstream.to(one.dtype) for one in grads]
        return (*scaled, None, None, None)


def _chunk_tokens(head_VH: Tensor) -> int:
    if head_VH.device.type == "cpu":
        return _CPU_CHUNK_TOKENS
    return max(_CPU_CHUNK_TOKENS, _GPU_CHUNK_LOGITS // len(head_VH))
