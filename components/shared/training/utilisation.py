"""What a training made of its machine: model FLOPs, the share of the device's peak (MFU), peak memory, utilisation of the GPU.

FLOPs are counted from the shapes, as in A. Chowdhery et al., PaLM, arXiv:2204.02311, appendix B, with attention over the tokens
that a token may see: what the model needs, without recomputed activations, reference models, and the forward passes that
measure forgetting or gradients.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..artifacts import Utilisation
from ..model.mixed_model import MixedModel
from .streams import StepData

PEAK_BF16_FLOPS = {
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""Dense bf16 FLOPs per second by NVIDIA's data sheets. The first name that the device's name contains counts."""
SAMPLE_SECONDS = 5.0


def peak_flops(device: str, precision: str) -> float | None:
    """Returns the peak FLOPs per second of a device by its name; None if it is not known, and for float32."""
    if precision != "bf16":
        return None
    words = f" {device.replace('-', ' ')} "
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if f" {name} " in words), None)


class FlopsOfModel:
    """Counts the FLOPs of optimizer steps: forward, and backward for what is trained.

    Attributes:
        known: whether they can be counted. Layers with weights of more than two dimensions, such as experts, of which a token
            takes some, are not understood.
    """

    def __init__(self, model: MixedModel) -> None:
        backbone = model.lm.base_model
        inside = {id(module) for module in backbone.modules()}
        self._per_token = _of_matrices(backbone.modules())
        self._per_predicted = _of_matrices(one for one in model.lm.modules() if id(one) not in inside)
        self._per_example = 0.0
        if model.task is not None:
            self._per_example = _of_matrices(one for one in model.task.modules() if id(one) not in inside)
        self._has_head = model.task is not None
        config: Any = model.config.get_text_config()
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * heads
        # For each pair two products of vectors of this width, each 2 FLOPs for one multiplication and addition, and twice that
        # in the backward pass.
        self._per_pair = 12.0 * layers * width
        self._causal = model.objective == "causal_lm"
        self.known = all(weight.dim() <= 2 for weight in backbone.parameters())

    def of(self, data: StepData) -> float:
        """Returns the FLOPs of one optimizer step, over all ranks."""
        lengths = [len(segment.tokens) for row in data.rows for segment in row]
        pairs = sum(length * (length + 1) // 2 if self._causal else length**2 for length in lengths)
        predicted = data.num_pretrain + (0 if self._has_head else data.num_finetune)
        return (
            self._per_token * (data.tokens_pretrain + data.tokens_finetune)
            + self._per_predicted * predicted
            + self._per_example * (data.num_finetune if self._has_head else 0)
            + self._per_pair * pairs
        )


class Counts(Protocol):
    """What a training counts; see `loop.Result`."""

    steps: int
    tokens: dict[str, int]
    seconds: float
    flops: float
    device: str
    precision: str
    processes: int


class Meter:
    """Measures a training while it runs.

    Args:
        model: the model, with what is trained and what is frozen.
        result: its counts grow with each step.
    """

    def __init__(self, model: MixedModel, device: torch.device, result: Counts) -> None:
        self._flops, self._device, self._result = FlopsOfModel(model), device, result
        self._busy: list[float] = []
        self._sampled = time.monotonic()
        self._samples = device.type == "cuda"
        if self._samples:
            torch.cuda.reset_peak_memory_stats(device)

    def after_step(self, data: StepData) -> None:
        """Counts a step, and looks at the GPU every few seconds."""
        self._result.flops += self._flops.of(data)
        if self._samples and time.monotonic() - self._sampled >= SAMPLE_SECONDS:
            self._sampled = time.monotonic()
            # Needs nvidia-ml-py and a driver that answers; without them the utilisation is not known.
            self._samples = False
            with suppress(ImportError, RuntimeError, AttributeError):
                self._busy.append(float(torch.cuda.utilization(self._device)))
                self._samples = True

    def measured(self) -> Utilisation:
        """Returns what was measured, of this process where a value is not of the whole training."""
        result = self._result
        if result.seconds <= 0 or not result.steps:
            return Utilisation()
        known = self._flops.known
        peak = peak_flops(result.device, result.precision)
        rate = result.flops / result.seconds if known else None
        return Utilisation(
            tokens_per_second=sum(result.tokens.values()) / result.seconds,
            flops_per_second=rate,
            mfu=rate / (peak * result.processes) if rate is not None and peak is not None else None,
            peak_memory_bytes=self._peak_memory(),
            gpu_utilisation=sum(self._busy) / len(self._busy) / 100 if self._busy else None,
        )

    def _peak_memory(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_reserved(self._device))
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _of_matrices(modules: Iterator[nn.Module]) -> float:
    """Returns the FLOPs of the layers' products for one input: for the output, and the gradients of input and weights."""
    layers = (module for module in modules if isinstance(module, nn.Linear | Conv1D))
    return float(sum(layer.weight.numel() * (6 if layer.weight.requires_grad else 4) for layer in layers))
