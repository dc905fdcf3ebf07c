"""Weights of labelled examples from the start model's loss on them (FLOW: S. Sanyal et al. 2025, arXiv:2502.02797).

    w_i = exp(-loss_i / τ),   τ = the median of the losses

Examples that the start model finds hard pull it away from what it knows, and count less. Shapes: E examples.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from ..config import Training
from ..model.mixed_model import MixedModel
from ..model.packing import collate, pack
from ..model.sharding import most_passes, release
from ..running.context import Context
from .control import LOGITS_AT_ONCE
from .streams import FinetuneStream, Mix


def flow_weights(losses_E: np.ndarray) -> np.ndarray:
    """Returns the (E,) weights; all 1 if the median of the losses is 0.

    Args:
        losses_E: mean loss of each example, in nats per token or per example, under the start model. One that is not finite
            gets a weight of NaN, so that the training stops and names the example.
    """
    scale = float(np.nanmedian(losses_E)) if len(losses_E) else 0.0
    return np.exp(-losses_E / scale) if scale > 0 and math.isfinite(scale) else np.ones(len(losses_E))


def weigh_examples(
    model: MixedModel, mix: Mix, training: Training, pad_id: int, accelerator: Accelerator, context: Context
) -> None:
    """Sets the weights of the labelled examples from the model's losses on them. All ranks take part."""
    assert mix.finetune is not None
    started = time.monotonic()
    losses = example_losses(model, mix.finetune, accelerator, mix.max_length, training.micro_batch_size, pad_id)
    mix.finetune.weights = flow_weights(losses)
    low, middle, high = np.nanquantile(losses, (0.25, 0.5, 0.75))
    context.say(
        f"FLOW: the start model's loss on {len(losses):,} examples has the quartiles {low:.3f}, {middle:.3f} and {high:.3f}; "
        f"it took {time.monotonic() - started:.1f} s"
    )


@torch.no_grad()
def example_losses(
    model: MixedModel,
    stream: FinetuneStream,
    accelerator: Accelerator,
    max_length: int,
    micro_batch_size: int,
    pad_id: int,
) -> np.ndarray:
    """Returns the (E,) mean loss of each example, without dropout. All ranks take part and get the same result."""
    mine = [
        replace(stream.segment(index), key=index)
        for index in range(accelerator.process_index, len(stream), accelerator.num_processes)
    ]
    rows = [[mine[place] for place in row] for row in pack([len(one.tokens) for one in mine], max_length)]
    # Σ ce and the number of the tokens of each example.
    sums = torch.zeros(2, len(stream), dtype=torch.float64, device=accelerator.device)
    chunk = max(1, LOGITS_AT_ONCE // model.vocabulary_size)
    trains = model.training
    model.eval()
    for number in range(most_passes(model, math.ceil(len(rows) / micro_batch_size), accelerator.device)):
        own = rows[number * micro_batch_size : (number + 1) * micro_batch_size]
        batch = collate(own or [[replace(stream.segment(0), key=0)]], pad_id).to(accelerator.device)
        with accelerator.autocast():
            losses_N = model.lm_token_losses(batch, chunk) if model.kind is None else model.head_losses(batch)
        key_N = batch.lm_key if model.kind is None else batch.label_key
        if own:  # else the others have one more pass, and this process only takes part
            sums[0].index_add_(0, key_N, losses_N.double())
            sums[1].index_add_(0, key_N, torch.ones_like(losses_N, dtype=torch.float64))
    release(model)
    model.train(trains)
    nats_E, count_E = accelerator.reduce(sums, "sum").cpu().numpy()
    found: np.ndarray = nats_E / np.maximum(count_E, 1)
    return found
