"""The mixed loss of the LM head: computes loss and gradients for a few hundred tokens at a time.

The weight of every token in the loss is known before the forward pass, and so is the gradient of its logits,
w_i · (softmax(z_i) - onehot(y_i)). The forward pass therefore computes the gradients too, the logits of all supervised tokens
never exist at once, and the backward pass only returns the gradients. The idea is that of Liger's fused linear cross-entropy
(arXiv:2410.10989).

The vocabulary is processed in tiles that fit a processor's last-level cache. A tile has its own softmax σ_k with log-sum s_k;
over the whole vocabulary it is e^(s_k - s) · σ_k with s = log Σ_k e^(s_k), as in FlashAttention (arXiv:2205.14135). The factor
is applied to the smaller operand of both products, which saves a pass over the logits. PyTorch's own `linear_cross_entropy`
returns a bf16 model's sum in bf16, with three digits: too coarse to log or to control λ.

Shapes: N tokens, H hidden size, V vocabulary, n tokens of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ..third_party.torch import has_bf16_products
from .heads import HiddenStates, on_hidden

_CPU_CHUNK_TOKENS, _CPU_TILE_ENTRIES = 640, 3200  # tests/benchmarks/README.md
# oneDNN compiles its bf16 products for every new shape, so chunk sizes are rounded to a multiple.
_LOW_PRECISION_MULTIPLE = 64
_GPU_CHUNK_LOGITS = 2**26  # few kernel launches; one tile


@torch.no_grad()
def plain_head(lm: PreTrainedModel) -> nn.Linear | None:
    """Returns the LM head if it is a single matrix: no bias, no transform before it, no cap or scale after it."""
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.is_meta:
        return None
    # Large values reveal a cap on the logits.
    some = 100 * torch.linspace(-1, 1, 2 * head.in_features, dtype=head.weight.dtype, device=head.weight.device)
    hidden = some.view(2, head.in_features)
    try:
        logits = on_hidden(lm, HiddenStates(hidden[None])).logits[0]
    except Exception:  # the head needs more than hidden states
        return None
    return head if torch.equal(logits, head(hidden)) else None


def can_be_chunked(lm: PreTrainedModel, head: nn.Linear) -> bool:
    """Tells whether the head is still that layer. Adapters replace it; weights sharded over ranks cannot be read here."""
    return lm.get_output_embeddings() is head and type(head.weight) is nn.Parameter


def chunked_losses(
    head: nn.Linear,
    hidden_NH: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    is_pretrain_N: Tensor,
    own_weight_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns Σ w_i · v_i · ce_i, and Σ v_i · ce_i of each stream, in nats.

    Args:
        head: the LM head, as `plain_head` returned it.
        hidden_NH: hidden states that predict the targets.
        target_N: token ids to predict.
        weight_N: w_i.
        is_pretrain_N: whether a token belongs to the pretraining stream.
        own_weight_N: v_i, weights within a stream; None if all are 1.

    Returns:
        Three scalars in float32 (float64 for a model in float64); only the first can be differentiated, and only once.
    """
    kind = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    # A function of autograd is told that weights need gradients, even where none are computed.
    weight_VH = head.weight if torch.is_grad_enabled() else head.weight.detach()
    if own_weight_N is not None:
        weight_N = weight_N * own_weight_N
    with torch.autocast(kind, enabled=False):
        weighted, ce_N = _ChunkedLoss.apply(hidden_NH, weight_VH, target_N, weight_N, dtype)  # type: ignore[no-untyped-call]
    return weighted, *sums_by_stream(ce_N if own_weight_N is None else ce_N * own_weight_N, is_pretrain_N)


def sums_by_stream(ce_N: Tensor, is_pretrain_N: Tensor) -> tuple[Tensor, Tensor]:
    """Returns Σ ce_i of each stream. Selecting by the mask would synchronise with a GPU, for the number of selected values."""
    return torch.where(is_pretrain_N, ce_N, 0).sum(), torch.where(is_pretrain_N, 0, ce_N).sum()


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, weight_N: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        with_hidden, with_head = ctx.needs_input_grad[:2]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        hidden, head = hidden_NH.to(dtype), head_VH.to(dtype)
        if dtype != wide and head.device.type == "cpu" and not has_bf16_products():
            hidden, head, dtype = hidden.to(wide), head.to(wide), wide
        num_tokens, weight_N = len(target_N), weight_N.to(wide)
        if dtype != wide and (missing_tokens := -num_tokens % _LOW_PRECISION_MULTIPLE):
            hidden = F.pad(hidden, (0, 0, 0, missing_tokens))
            target_N, weight_N = (F.pad(values, (0, missing_tokens)) for values in (target_N, weight_N))
        chunk_tokens, tile_entries = _sizes(len(target_N), head)
        ce_N = torch.empty(len(target_N), dtype=wide, device=hidden.device)
        grad_hidden = hidden_NH.new_empty(hidden.shape) if with_hidden else None
        grad_head: Tensor | None = None
        if with_head:  # zeros if no chunk will write to it
            grad_head = (torch.empty if num_tokens else torch.zeros)(head.shape, dtype=wide, device=head.device)
        scratch = _Scratch.of(chunk_tokens, tile_entries, head, wide)
        for start in range(0, len(target_N), chunk_tokens):
            at = slice(start, start + chunk_tokens)
            h, target, weight = hidden[at], target_N[at], weight_N[at, None]
            tiles, z_target, log_sum, at_target = scratch.tiles(h, head, target)
            ce_N[at] = (log_sum - z_target)[:, 0]
            # The gradient of the target's own logit is softmax - 1, near certainty a small difference of large numbers, hence
            # expm1. With one tile (factor 1) it replaces the entry; with several it is added separately.
            missing, single = torch.expm1(z_target - log_sum), len(tiles) == 1
            scratch.softmax[at_target] = missing[:, 0].to(dtype) if single else 0
            if grad_hidden is not None:
                g = torch.zeros_like(h, dtype=wide) if single else missing * head[target]
                for entries, softmax, log_sum_k in tiles:
                    g.addcmul_(softmax @ head[entries], (log_sum_k - log_sum).exp())
                grad_hidden[at] = g * weight
            if grad_head is not None:
                # w_i stays in the wide format: rounding all weights of a stream alike would change λ.
                weighted = h.to(wide) * weight
                for entries, softmax, log_sum_k in tiles:
                    narrow = (weighted * (log_sum_k - log_sum).exp()).to(dtype)
                    _add_product(grad_head[entries], softmax.t(), narrow, first=start == 0)
                if not single:
                    grad_head.index_add_(0, target, weighted * missing)
        grad_hidden = grad_hidden[:num_tokens] if grad_hidden is not None else None
        # Not by `save_for_backward`, which would keep the gradients until after the parameters have copied them.
        ctx.grads = (grad_hidden, grad_head.to(head_VH.dtype) if grad_head is not None else None)
        ce_N, weight_N = ce_N[:num_tokens], weight_N[:num_tokens]
        ctx.mark_non_differentiable(ce_N)
        return (ce_N * weight_N).sum(), ce_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the loss of the LM head can be differentiated only once")
        # Almost always 1. On a GPU the comparison would synchronise.
        if upstream.device.type != "cpu" or upstream != 1:
            for grad in grads:
                if grad is not None:
                    grad.mul_(upstream)  # in place: memory is at its peak here
        return (*grads, None, None, None)


@dataclass(frozen=True)
class _Scratch:
    """Buffers that all chunks share: allocating memory of this size costs as much as a matrix product.

    Attributes:
        logits: logits of a tile, in the format of the matrix products.
        wide: softmax of a tile, if it is computed in another format.
        softmax: softmax of all tiles, in the format of the matrix products.
        tile_entries: vocabulary entries in a tile; fewer in the last tile.
    """

    logits: Tensor
    wide: Tensor | None
    softmax: Tensor
    tile_entries: int

    @classmethod
    def of(cls, chunk_tokens: int, tile_entries: int, head_VH: Tensor, wide: torch.dtype) -> _Scratch:
        """Allocates buffers for chunks of at most `chunk_tokens` tokens."""
        logits, every = (head_VH.new_empty(chunk_tokens * size) for size in (tile_entries, len(head_VH)))
        return cls(logits, None if wide == head_VH.dtype else torch.empty_like(logits, dtype=wide), every, tile_entries)

    def tiles(
        self, hidden_nH: Tensor, head_VH: Tensor, target_n: Tensor
    ) -> tuple[list[tuple[slice, Tensor, Tensor]], Tensor, Tensor, Tensor]:
        """Computes the softmax of each tile separately.

        Returns:
            For each tile its slice of the vocabulary, its softmax, (n, entries), and its log-sum, (n, 1). Then the target's
            logit and the log-sum over the whole vocabulary, (n, 1) each, and the flat indices of the targets in `softmax`,
            (n,).
        """
        n, vocabulary = len(hidden_nH), len(head_VH)
        tiles: list[tuple[slice, Tensor, Tensor]] = []
        z_target: Tensor | None = None
        for first in range(0, vocabulary, self.tile_entries):
            entries = slice(first, min(first + self.tile_entries, vocabulary))
            width = entries.stop - first
            z = self.logits[: n * width].view(n, width)
            softmax = self.softmax[n * first : n * entries.stop].view(n, width)
            torch.mm(hidden_nH, head_VH[entries].t(), out=z)
            p = softmax if self.wide is None else self.wide[: n * width].view(n, width)
            torch.softmax(z, 1, dtype=p.dtype, out=p)
            # Computed from the largest logit: its probability is at least 1/width, so that its logarithm is exact.
            log_sum = z.amax(1, keepdim=True).to(p.dtype) - p.amax(1, keepdim=True).log()
            if p is not softmax:
                softmax.copy_(p)
            at = target_n[:, None] - first
            here = z.gather(1, at.clamp(0, width - 1)).to(p.dtype)
            z_target = here if z_target is None else torch.where((at >= 0) & (at < width), here, z_target)
            tiles.append((entries, softmax, log_sum))
        first_n = target_n // self.tile_entries * self.tile_entries
        width_n = (vocabulary - first_n).clamp(max=self.tile_entries)
        row_n = torch.arange(n, device=target_n.device)
        at_target = n * first_n + row_n * width_n + target_n - first_n
        assert z_target is not None
        return tiles, z_target, torch.stack([log_sum for _, _, log_sum in tiles]).logsumexp(0), at_target


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Computes total += a @ b, or total = a @ b if `first`. Uses one operation if the formats are equal."""
    if total.dtype != a.dtype:
        product = a @ b
        _ = total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(a, b, out=total)
    else:
        torch.addmm(total, a, b, out=total)


def _sizes(num_tokens: int, head_VH: Tensor) -> tuple[int, int]:
    """Returns the tokens of a chunk, so that all chunks are about equal, and the vocabulary entries of a tile."""
    cpu = head_VH.device.type == "cpu"
    most = _CPU_CHUNK_TOKENS if cpu else max(1, _GPU_CHUNK_LOGITS // len(head_VH))
    chunks = max(1, math.ceil(num_tokens / most))
    return max(1, math.ceil(num_tokens / chunks)), min(len(head_VH), _CPU_TILE_ENTRIES) if cpu else len(head_VH)
