"""The training loop. One engine for three stages: λ = 1 pretrains, λ = 0 fine-tunes, in between it does both.

For each optimizer step, with N_pt and N_ft the counts of supervised tokens over all micro-batches and ranks,

    L = Σ_i w_i · ce_i,   w_i = λ / N_pt  for pretraining tokens,   (1 - λ) / N_ft  for fine-tuning tokens

times the number of ranks before backward, since DDP and FSDP average gradients. Every rank computes which rows all ranks
read, so the counts need no communication.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import AdamW
from transformers import get_scheduler, set_seed

from .config import Training
from .context import Context
from .errors import MixtuneError
from .model import MixedModel, pick_precision
from .packing import collate
from .streams import Mix


@dataclass
class Result:
    """What a training run leaves.

    Attributes:
        curve: one object for each logged step.
        tokens: tokens seen, by stream.
        realised_mix_weight: share of the gradient weights that pretraining tokens had, averaged over the steps.
        seconds: wall-clock time of the loop.
    """

    curve: list[dict[str, float | int | None]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=lambda: {"pretrain": 0, "finetune": 0})
    realised_mix_weight: float = 0.0
    seconds: float = 0.0
    device: str = "cpu"
    precision: str = "float32"


@dataclass
class _Interval:
    """Sums since the last logged step."""

    loss_pretrain: torch.Tensor
    loss_finetune: torch.Tensor
    num_pretrain: int = 0
    num_finetune: int = 0
    tokens_pretrain: int = 0
    tokens_finetune: int = 0
    positions: int = 0
    started: float = field(default_factory=time.monotonic)


def train(
    model: MixedModel,
    mix: Mix,
    training: Training,
    mix_weight: float,
    pad_id: int,
    seed: int,
    context: Context,
) -> Result:
    """Trains in place.

    Args:
        model: on the CPU; the accelerator moves it.
        mix: what each optimizer step reads.
        mix_weight: λ, in [0, 1].
        pad_id: token id for padding.

    Raises:
        MixtuneError: where a loss or a gradient is not finite; the weights are then those before that step.
    """
    set_seed(seed)
    precision = pick_precision(training.precision)
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no", cpu=not torch.cuda.is_available()
    )
    _freeze_what_has_no_loss(model, mix_weight)
    if training.gradient_checkpointing:
        model.lm.gradient_checkpointing_enable()
    optimizer = AdamW(_parameter_groups(model, training), lr=training.learning_rate, fused=True)
    schedule = get_scheduler(training.schedule, optimizer, training.warmup_steps, training.steps)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    wrapped.train()

    result = Result(device=_device_name(accelerator.device), precision=precision)
    started = time.monotonic()
    realised = 0.0
    interval = _new_interval(accelerator.device)
    with context.progress(training.steps, "steps") as progress:
        for step in range(training.steps):
            data = mix.step(step)
            pretrain_weight = mix_weight / max(data.num_pretrain, 1)
            finetune_weight = (1 - mix_weight) / max(data.num_finetune, 1)
            micro_batches = list(
                data.share(accelerator.process_index, accelerator.num_processes, training.micro_batch_size)
            )
            for number, rows in enumerate(micro_batches):
                batch = collate(rows, pad_id).to(accelerator.device)
                # Gradients are summed over micro-batches and exchanged between ranks with the last one only.
                with accelerator.no_sync(wrapped) if number + 1 < len(micro_batches) else contextlib.nullcontext():
                    losses = wrapped(batch, pretrain_weight, finetune_weight)
                    accelerator.backward(losses["weighted"] * accelerator.num_processes)
                interval.loss_pretrain += losses["pretrain"]
                interval.loss_finetune += losses["finetune"]
                interval.positions += batch.input_ids.numel()
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), training.max_grad_norm)
            if not torch.isfinite(norm):
                raise _not_finite(step, interval)
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)

            given = pretrain_weight * data.num_pretrain + finetune_weight * data.num_finetune
            realised_now = pretrain_weight * data.num_pretrain / given if given else 0.0
            realised += realised_now
            result.tokens["pretrain"] += data.tokens_pretrain
            result.tokens["finetune"] += data.tokens_finetune
            interval.num_pretrain += data.num_pretrain
            interval.num_finetune += data.num_finetune
            interval.tokens_pretrain += data.tokens_pretrain
            interval.tokens_finetune += data.tokens_finetune
            progress.advance(tokens=data.tokens_pretrain + data.tokens_finetune)
            if (step + 1) % training.log_every_steps == 0 or step + 1 == training.steps:
                entry = _log_entry(accelerator, interval, step + 1, mix_weight, realised_now, rates, float(norm))
                result.curve.append(entry)
                context.tracker.log_metrics({name: value for name, value in entry.items() if name != "step"}, step + 1)
                interval = _new_interval(accelerator.device)
    result.seconds = time.monotonic() - started
    result.realised_mix_weight = realised / max(training.steps, 1)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    # Undo accelerate's wrapping of `forward`, so that the caller gets back the model that it gave.
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).to("cpu")
    return result


def _freeze_what_has_no_loss(model: MixedModel, mix_weight: float) -> None:
    """λ = 0 and λ = 1 are plain fine-tuning and plain pretraining: weight decay must not touch the other loss's head."""
    if model.head is None:
        return
    if mix_weight == 1:
        model.head.requires_grad_(False)
    if mix_weight == 0 and not model.lm.config.tie_word_embeddings:
        model.lm.get_output_embeddings().requires_grad_(False)


def _parameter_groups(model: MixedModel, training: Training) -> list[dict[str, Any]]:
    """Backbone and head with their learning rates; weight decay on matrices only."""
    head_rate = training.head_learning_rate or training.learning_rate
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("head."), parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": head_rate if is_head else training.learning_rate,
            "weight_decay": training.weight_decay if is_matrix else 0.0,
        }
        for (is_head, is_matrix), parameters in groups.items()
    ]


def _new_interval(device: torch.device) -> _Interval:
    return _Interval(torch.zeros((), device=device), torch.zeros((), device=device))


def _log_entry(
    accelerator: Accelerator,
    interval: _Interval,
    step: int,
    mix_weight: float,
    realised_mix_weight: float,
    rates: list[float],
    norm: float,
) -> dict[str, float | int | None]:
    """Means over the interval, a count for each stream; sums are gathered from all ranks first."""
    sums = accelerator.reduce(torch.stack([interval.loss_pretrain, interval.loss_finetune]), "sum")
    pretrain = float(sums[0]) / interval.num_pretrain if interval.num_pretrain else None
    finetune = float(sums[1]) / interval.num_finetune if interval.num_finetune else None
    tokens = interval.tokens_pretrain + interval.tokens_finetune
    seconds = max(time.monotonic() - interval.started, 1e-9)
    return {
        "step": step,
        "loss": mix_weight * (pretrain or 0.0) + (1 - mix_weight) * (finetune or 0.0),
        "loss_pretrain": pretrain,
        "loss_finetune": finetune,
        "mix_weight": mix_weight,
        "realised_mix_weight": realised_mix_weight,
        "replay_share": interval.tokens_pretrain / max(tokens, 1),
        "learning_rate": rates[0],
        "head_learning_rate": rates[-1],
        "grad_norm": norm,
        "supervised_pretrain": interval.num_pretrain,
        "supervised_finetune": interval.num_finetune,
        "tokens_pretrain": interval.tokens_pretrain,
        "tokens_finetune": interval.tokens_finetune,
        "tokens_per_second": tokens / seconds,
        "padding_share": max(0.0, 1 - tokens / max(interval.positions * accelerator.num_processes, 1)),
    }


def _not_finite(step: int, interval: _Interval) -> MixtuneError:
    streams = [
        name
        for name, value in (("pretraining", interval.loss_pretrain), ("fine-tuning", interval.loss_finetune))
        if not math.isfinite(float(value))
    ]
    where = f"the loss of the {' and the '.join(streams)} stream" if streams else "the gradient"
    return MixtuneError(
        f"step {step + 1}: {where} is not finite; lower the learning rate, or set precision to float32, and look at the data"
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
