"""The LM head in chunks against full logits: loss, gradients, and the memory that both need."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtune.components.shared.model.lm_loss import chunked_losses

from .bounds import FLOAT32, needs_gpu

MEMORY_SHARE = 0.4
"""Peak memory in chunks, of that with full logits."""


Problem = tuple[nn.Linear, Tensor, Tensor, Tensor, Tensor]


def drawn(device: torch.device, tokens: int, hidden: int, vocabulary: int) -> Problem:
    """An LM head, hidden states, targets, their weights, and which belong to the pretraining stream."""
    draw = torch.Generator().manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocabulary, hidden, generator=draw) / hidden**0.5)
    states = torch.randn(tokens, hidden, generator=draw).to(device).requires_grad_()
    target = torch.randint(0, vocabulary, (tokens,), generator=draw).to(device)
    text = (torch.rand(tokens, generator=draw) < 0.5).to(device)
    weight = torch.where(text, 0.3, 0.7).double() / tokens
    return head.to(device), states, target, weight, text


def backward(problem: Problem, precision: torch.dtype, chunked: bool) -> Tensor:
    """Computes the loss and the gradients, in chunks or with full logits."""
    head, states, target, weight, text = problem
    head.zero_grad()
    states.grad = None
    with torch.autocast(states.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        if chunked:
            loss = chunked_losses(head, states, target, weight, text)[0]
        else:
            loss = (F.cross_entropy(head(states).float(), target, reduction="none") * weight).sum()
    torch.autograd.backward(loss)
    return loss.detach()


def relative(value: Tensor | None, exact: Tensor | None) -> float:
    """The norm of the difference over the norm."""
    assert value is not None
    assert exact is not None
    return float((value.double() - exact).norm() / exact.norm())


def errors(
    device: torch.device, precision: torch.dtype, tokens: int, hidden: int, vocabulary: int
) -> list[list[float]]:
    """Relative errors of loss, gradient of the states and gradient of the head against float64: in chunks, and fully."""
    problem = drawn(device, tokens, hidden, vocabulary)
    head, states, target, weight, _ = problem
    wide, wide_states = head.weight.detach().double().requires_grad_(), states.detach().double().requires_grad_()
    exact = (F.cross_entropy(wide_states @ wide.T, target, reduction="none") * weight).sum()
    torch.autograd.backward(exact)
    wanted = [exact.detach(), wide_states.grad, wide.grad]
    found = []
    for chunked in (True, False):
        values = [backward(problem, precision, chunked), states.grad, head.weight.grad]
        found.append([relative(value, exactly) for value, exactly in zip(values, wanted, strict=True)])
    return found


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_chunks_are_as_exact_as_full_logits(
    device: torch.device, record: Callable[..., None], precision: torch.dtype
) -> None:
    # On a GPU, so many tokens that there are several chunks.
    sizes = (8192, 512, 50_000) if device.type == "cuda" else (700, 32, 4000)
    chunked, full = errors(device, precision, *sizes)
    record(chunked=chunked, full=full)
    assert chunked[0] <= max(1.5 * full[0], FLOAT32)
    for ours, theirs in zip(chunked[1:], full[1:], strict=True):
        assert ours <= max(1.5 * theirs, FLOAT32)


@needs_gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_chunks_need_a_fraction_of_the_memory(
    device: torch.device, record: Callable[..., None], precision: torch.dtype
) -> None:
    problem = drawn(device, 16_384, 1024, 50_000)
    peaks = []
    for chunked in (True, False):
        backward(problem, precision, chunked)  # with the workspace of the matrix products
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        backward(problem, precision, chunked)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    record(chunked_bytes=peaks[0], full_bytes=peaks[1])
    assert peaks[0] <= MEMORY_SHARE * peaks[1]
