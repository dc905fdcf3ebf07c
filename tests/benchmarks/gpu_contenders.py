"""Training loops that `gpu_engine.py` times one after another on one GPU, and the loss kernels that it compares."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtune.components.shared.config import Training
from mixtune.components.shared.model import mixed_model
from mixtune.components.shared.model.lm_loss import chunked_losses
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.precision import autocast
from mixtune.components.shared.running.context import Context, ProgressCounter
from mixtune.components.shared.training.loop import train
from mixtune.components.shared.training.mix_weight import Constant

from .workload import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    PAD_ID,
    WEIGHT_DECAY,
    Size,
    Steps,
    first,
    padded,
    rows_in_order,
    supervised,
)

MIX_WEIGHT = 0.3
PROFILED_STEPS = 3


@dataclass(frozen=True)
class Setting:
    """How a contender trains.

    Attributes:
        size: the model and its data.
        micro_batch: packed rows of `size.max_length` tokens in one pass.
        warm_up: optimizer steps that are not timed.
        steps: optimizer steps that are.
    """

    size: Size
    device: torch.device
    precision: str
    micro_batch: int
    warm_up: int
    steps: int
    compiled: bool = False
    attention: str = "auto"
    checkpointing: bool = False


class Clock:
    """Notes the end of each optimizer step without waiting for the GPU, and the losses.

    Args:
        profile: folder for a trace and a table of the kernels of some steps; None profiles nothing.
    """

    def __init__(self, setting: Setting, profile: Path | None = None) -> None:
        self._setting, self._folder = setting, profile
        self._on_gpu = setting.device.type == "cuda"
        self._marks: list[Any] = []
        self._profiler: Any = None
        self.losses: list[float] = []

    def step_ended(self) -> None:
        """Notes the time."""
        if self._on_gpu:
            mark: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append(mark)
        self._profile()

    def seconds(self) -> list[float]:
        """Returns the time of each step after the warm-up."""
        marks = self._marks[self._setting.warm_up - 1 :]
        pairs = pairwise(marks)
        if self._on_gpu:
            torch.cuda.synchronize()
            return [float(a.elapsed_time(b)) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]

    def _profile(self) -> None:
        if self._folder is None:
            return
        if len(self._marks) == self._setting.warm_up:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if self._on_gpu else []
            self._profiler = torch.profiler.profile(activities=kinds, record_shapes=True)
            self._profiler.start()
        elif len(self._marks) == self._setting.warm_up + PROFILED_STEPS:
            self._profiler.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            order = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
            table = self._profiler.key_averages().table(sort_by=order, row_limit=40)
            (self._folder / "kernels.txt").write_text(table, encoding="utf-8")
            self._profiler.export_chrome_trace(str(self._folder / "trace.json.gz"))


class _Ticking(ProgressCounter):
    def __init__(self, clock: Clock) -> None:
        super().__init__("benchmark", 1, "steps", quiet=True)
        self._clock = clock

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        self._clock.step_ended()


class _TimedContext(Context):
    def __init__(self, clock: Clock) -> None:
        from mixtune.components.shared.tracking.tracker import Tracker

        super().__init__(title="benchmark", tracker=Tracker.off(), quiet=True)
        self._clock = clock

    @contextlib.contextmanager
    def progress(self, total: int, unit: str, what: str = "", done: int = 0) -> Iterator[ProgressCounter]:  # type: ignore[override]
        yield _Ticking(self._clock)


def mixtune(setting: Setting, clock: Clock, labels_only: bool = False) -> None:
    """mixtune's own loop, as every step of the pipeline runs it."""
    steps = setting.warm_up + setting.steps
    training = Training(
        steps=steps,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        micro_batch_size=setting.micro_batch,
        compile=setting.compiled,
        gradient_checkpointing=setting.checkpointing,
        precision="bf16" if setting.precision == "bf16" else "float32",
        log_every_steps=max(1, steps // 2),
    )
    model = MixedModel(setting.size.model())
    model.to(setting.device).set_attention(setting.attention)
    data: Any = Steps(setting.size, labels_only=labels_only)
    weight = Constant(0.0 if labels_only else MIX_WEIGHT)
    result = train(model, data, training, weight, PAD_ID, 0, _TimedContext(clock))
    clock.losses += [float(entry["loss"] or 0) for entry in result.curve]


def sft(setting: Setting, clock: Clock) -> None:
    """A plain SFT step of the same model on as many tokens: mixtune with λ = 0."""
    mixtune(setting, clock, labels_only=True)


def two_passes(setting: Setting, clock: Clock) -> None:
    """What people write by hand: one padded pass for each stream, with full logits, in parts of as many tokens as mixtune's."""
    size, device = setting.size, setting.device
    model: Any = size.model()
    model.to(device)
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if setting.compiled:
        model.compile(dynamic=True)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    rows = rows_in_order(size, setting.warm_up + setting.steps)
    room = setting.micro_batch * size.max_length
    logged = 0.0
    for step in range(setting.warm_up + setting.steps):
        these = first(size.sequences, rows)
        total = torch.zeros((), device=device)
        for stream, weight in ((these[: size.windows], MIX_WEIGHT), (these[size.windows :], 1 - MIX_WEIGHT)):
            per_part = max(1, room // max(len(row["input_ids"]) for row in stream))
            for start in range(0, len(stream), per_part):
                given = {name: one.to(device) for name, one in padded(stream[start : start + per_part]).items()}
                with autocast(device, setting.precision):  # type: ignore[arg-type]
                    loss = weight * model(**given, num_items_in_batch=supervised(stream), use_cache=False).loss
                torch.autograd.backward(loss)
                total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        logged += float(total)
        if (step + 1) % max(1, (setting.warm_up + setting.steps) // 2) == 0:
            clock.losses.append(logged / max(1, (setting.warm_up + setting.steps) // 2))
            logged = 0.0
        clock.step_ended()


class Kernel(Protocol):
    """Has the arguments and results of `chunked_losses`. No token has a weight of its own within its stream."""

    def __call__(
        self,
        head: nn.Linear,
        hidden: Tensor,
        target: Tensor,
        weight: Tensor,
        is_text: Tensor,
        own_weight: None = None,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def full_logits(
    head: nn.Linear, hidden: Tensor, target: Tensor, weight: Tensor, is_text: Tensor, own_weight: None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All logits at once."""
    ce = F.cross_entropy(head(hidden).float(), target, reduction="none")
    return (ce * weight).sum(), torch.where(is_text, ce, 0).sum().detach(), torch.where(is_text, 0, ce).sum().detach()


def trl_kernel(
    head: nn.Linear, hidden: Tensor, target: Tensor, weight: Tensor, is_text: Tensor, own_weight: None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's log-probabilities in chunks, in the chunk size of its trainers."""
    from trl.kernels import ChunkedLogProbFunction

    found: Any = ChunkedLogProbFunction.apply(hidden, head.weight, None, target, 1.0, 8192, None, 1.0, ())
    ce = -found[0]
    return (ce * weight).sum(), torch.where(is_text, ce, 0).sum().detach(), torch.where(is_text, 0, ce).sum().detach()


def liger_kernel(
    head: nn.Linear, hidden: Tensor, target: Tensor, weight: Tensor, is_text: Tensor, own_weight: None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Liger's fused loss, which has one weight for all tokens: once for each stream."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    low = (
        torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
    )
    sums, total = [], torch.zeros((), device=hidden.device)
    for chosen in (is_text, ~is_text):
        some = chosen.nonzero()[:, 0]
        found = hidden.new_zeros(())
        if len(some):
            found = loss(head.weight.to(low), hidden[some].to(low), target[some])
            total = total + found * weight[some[0]]
        sums.append(found.detach())
    return total, sums[0], sums[1]


KERNELS: dict[str, Kernel] = {
    "mixtune": chunked_losses,
    "full logits": full_logits,
    "TRL": trl_kernel,
    "Liger": liger_kernel,
}
NEEDS = {"TRL": "trl.trainer.utils", "Liger": "liger_kernel.transformers"}
"""Modules of the kernels that other packages bring."""


@contextlib.contextmanager
def using(kernel: Kernel) -> Iterator[None]:
    """mixtune's training with another loss kernel."""
    own = vars(mixed_model)["chunked_losses"]
    vars(mixed_model)["chunked_losses"] = kernel
    try:
        yield
    finally:
        vars(mixed_model)["chunked_losses"] = own
