"""Documents of a packed row do not see each other, whatever computes attention: in values, and in gradients exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch

from mixtune.components.shared.model.checks import check_model
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import Segment, collate
from mixtune.components.shared.model.precision import autocast
from tests.components.shared.compared import assert_close
from tests.components.shared.test_loss import make_streams, ours, reference
from tests.components.shared.tiny import ARCHITECTURES, ENCODERS, random_documents, tiny_model

from .bounds import BF16, FLOAT32, needs_compiler, needs_flash_attention, needs_gpu
from .conftest import ALL

HIDDEN = 64
"""The kernels want at least 16 numbers a head."""
FLEX = pytest.param("flex_attention", marks=[needs_gpu, needs_compiler])
FLASH = pytest.param("flash_attention_2", marks=needs_flash_attention)
CHOSEN: list[tuple[str, Any]] = [("llama", "sdpa")]
if ALL:
    CHOSEN = [(architecture, each) for architecture in (*ARCHITECTURES, *ENCODERS) for each in ("sdpa", "eager")]
    CHOSEN += [(architecture, each) for architecture in ARCHITECTURES for each in (FLEX, FLASH)]
PAIRS = [
    pytest.param(
        architecture, *getattr(each, "values", [each]), marks=getattr(each, "marks", ()), id=f"{architecture}-{i}"
    )
    for i, (architecture, each) in enumerate(CHOSEN)
]


def loaded(architecture: str, attention: str, device: torch.device) -> MixedModel:
    """As `load_model` leaves it."""
    model = tiny_model(architecture, task="generation" if architecture in ARCHITECTURES else None, hidden=HIDDEN)
    model.to(device).set_attention(attention)
    check_model(model, architecture)
    return model


@pytest.mark.parametrize(("architecture", "attention"), PAIRS)
def test_a_document_is_alone_in_any_row(
    device: torch.device, record: Callable[..., None], architecture: str, attention: str
) -> None:
    model = loaded(architecture, attention, device).eval()
    precision: Literal["bf16", "float32"] = "bf16" if attention.startswith("flash") else "float32"
    first, second, other = random_documents(3, 5, low=10)
    found = []
    with torch.no_grad(), autocast(device, precision):
        for neighbour in (first, other):
            for row in ([neighbour, second], [second, neighbour]):
                batch = collate(
                    [[Segment(tokens, 1, key=int(tokens is second)) for tokens in row], [Segment(first)]], 60
                )
                at = batch.lm_at[batch.lm_key == 1].to(device)
                found.append(model.lm_logits(model.hidden(batch.to(device))[at]).float())
        alone = model.lm_logits(model.hidden(collate([[Segment(second)]], 60).to(device))).float()[:-1]
    worst = max(float((logits - alone).norm() / alone.norm()) for logits in found)
    record(error=worst)
    assert worst <= (BF16 if precision == "bf16" else 10 * FLOAT32)


@pytest.mark.parametrize(("architecture", "attention"), PAIRS)
def test_no_gradient_of_a_document_reaches_its_neighbours(
    device: torch.device, architecture: str, attention: str
) -> None:
    model = loaded(architecture, attention, device)
    inputs: list[torch.Tensor] = []

    def keep(_: object, __: object, embedded: torch.Tensor) -> None:
        embedded.retain_grad()
        inputs.append(embedded)

    embeddings: Any = model.lm.get_input_embeddings()
    embeddings.register_forward_hook(keep)
    one, two, three = (Segment(tokens, key=number) for number, tokens in enumerate(random_documents(3, 7, low=10)))
    batch = collate([[one, two], [three, one]], 60).to(device)
    with autocast(device, "bf16" if attention.startswith("flash") else "float32"):
        of_two = model.hidden(batch)[batch.lm_at[batch.lm_key == 1]]
    torch.autograd.backward(of_two.float().square().sum())
    gradient = inputs[0].grad
    assert gradient is not None
    start, end = len(one.tokens), len(one.tokens) + len(two.tokens)
    assert bool(gradient[0, start : end - 1].any(-1).all())
    gradient[0, start:end] = 0
    assert not gradient.any(), "exactly zero everywhere else"


@pytest.mark.parametrize("attention", [FLEX, FLASH])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_for_packed_rows_give_the_gradient_of_the_reference(
    device: torch.device, record: Callable[..., None], architecture: str, attention: str
) -> None:
    model = loaded(architecture, attention, device)
    exact = tiny_model(architecture, task="generation", hidden=HIDDEN).double()
    streams = make_streams(5, 6, 6, architecture, "generation")
    flash = attention.startswith("flash")
    with autocast(device, "bf16" if flash else "float32"):
        found = ours(model, streams, 0.3, 3, True, 1)
    assert_close(
        {name: one.cpu() for name, one in found.items()}, reference(exact, streams, 0.3), BF16 if flash else FLOAT32
    )
