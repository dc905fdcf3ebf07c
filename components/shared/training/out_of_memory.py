"""Explains an out-of-memory error of a training: what needed the memory, and which option lowers the need."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch

from ..config import Training
from ..errors import MixtuneError, is_out_of_memory
from ..model.mixed_model import MixedModel
from ..model.packing import Segment, width_of
from ..model.sharding import local
from .streams import StepData

_ADAM_STATES = 2  # first and second moment
_FIXED_SHARE = 0.9  # of the memory: above, smaller micro-batches cannot help


class ExplainOutOfMemory:
    """Turns an out-of-memory error into one sentence with an option to change and its new value.

    Args:
        model: the trained model.
        training: its options.
    """

    def __init__(self, model: MixedModel, training: Training) -> None:
        self._model, self._training = model, training
        self._step: tuple[StepData, list[list[Segment]]] | None = None

    def note(self, data: StepData, rows: list[list[Segment]]) -> None:
        """Notes the step in work and the packed rows of its largest micro-batch."""
        self._step = data, rows

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, MixtuneError) and is_out_of_memory(error):
            raise MixtuneError(self._sentence()) from error

    def _sentence(self) -> str:
        fixed, available, where = self._fixed_bytes(), self._available_bytes(), self._where()
        if available is not None and fixed > _FIXED_SHARE * available:
            return (
                f"out of memory{where}: weights, gradients and optimizer states alone need {fixed / 1e9:.1f} of "
                f"{available / 1e9:.1f} GB; use more memory, a smaller model, or low-rank adapters (mixed.lora_ranks)"
            )
        if self._step is None:
            return f"out of memory{where} before the first step; use more memory"
        data, rows = self._step
        width = max(width_of(row) for row in rows)
        size = smaller_micro_batch(len(rows), width, data.max_length, self._training.micro_batch_size)
        advice = [f"micro_batch_size to {size}"] if size else []
        if not self._training.gradient_checkpointing:
            advice.append("gradient_checkpointing to true")
        elif not size:
            advice.append(f"model.max_length to {max(8, data.max_length // 2)}")
        found = f"{len(rows)} row{'s' if len(rows) > 1 else ''} of {width} tokens"
        return f"out of memory{where} with {found} in one pass; set {' or '.join(advice)}, or use more memory"

    def _where(self) -> str:
        return f" on {torch.cuda.get_device_name(self._model.device)}" if self._model.device.type == "cuda" else ""

    def _fixed_bytes(self) -> int:
        parameters = [(local(one).nbytes, one.requires_grad) for one in self._model.parameters()]
        return sum(size * (2 + _ADAM_STATES if trained else 1) for size, trained in parameters)

    def _available_bytes(self) -> int | None:
        if self._model.device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self._model.device)
        return free + torch.cuda.memory_reserved(self._model.device)


def smaller_micro_batch(rows: int, width: int, max_length: int, current: int) -> int | None:
    """Returns the largest `micro_batch_size` that gives micro-batches of at most half the rows, or the smallest, 1, if it gives
    fewer; None if none does.

    Args:
        rows: packed rows of the micro-batch that did not fit.
        width: tokens of the widest of them.
        max_length: maximum tokens per row.
        current: the present `micro_batch_size`.
    """
    if rows < 2 or current < 2:
        return None
    # A micro-batch holds micro_batch_size · max_length // width rows, at least one (see `StepData.share`).
    size = min(current - 1, ((rows // 2 + 1) * width - 1) // max_length)
    return size or (1 if max_length // width < rows else None)
