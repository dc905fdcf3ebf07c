"""The mixed step computes less than two padded passes with full logits: counted, not timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import collate
from tests.components.shared.compared import assert_close

from .workload import DEFAULT, LLAMA15M, PAD_ID, Size, Steps, flops_of_step, padded, rows_in_order, supervised

pytestmark = pytest.mark.numeric

MIX_WEIGHT = 0.3


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def counted(work: Callable[[], None]) -> int:
    """FLOPs of the matrix products in it, forward and backward; of attention PyTorch's counter knows the GPUs' kernels only."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize(("size", "share"), [(LLAMA15M, 0.49), (DEFAULT, 0.64)], ids=lambda value: str(value))
def test_a_mixed_step_takes_a_stated_share_of_the_flops_of_two_padded_passes(size: Size, share: float) -> None:
    rows = list(rows_in_order(size, 1))
    text, labelled = rows[: size.windows], rows[size.windows :]
    plain, mixed = size.model(), MixedModel(size.model())
    losses = []

    def two_passes() -> None:
        loss = MIX_WEIGHT * plain(**padded(text), num_items_in_batch=supervised(text)).loss
        loss = loss + (1 - MIX_WEIGHT) * plain(**padded(labelled), num_items_in_batch=supervised(labelled)).loss
        torch.autograd.backward(loss)
        losses.append(float(loss.detach()))

    def one_pass() -> None:
        data = Steps(size).step(0)
        batch = collate(data.rows, PAD_ID)
        loss = mixed(batch, MIX_WEIGHT / data.num_pretrain, (1 - MIX_WEIGHT) / data.num_finetune)["weighted"]
        torch.autograd.backward(loss)
        losses.append(float(loss.detach()))

    theirs, ours = counted(two_passes), counted(one_pass)
    assert len(gradients(mixed.lm)) == len(list(plain.parameters()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_close(gradients(mixed.lm), gradients(plain), 1e-5)
    assert ours < share * theirs
    # What the benchmark divides by the machine's rate is no more than what is really computed.
    assert flops_of_step(size, 0, attention=False) <= ours
