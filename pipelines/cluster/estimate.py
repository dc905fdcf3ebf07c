"""Estimates the cost of a configuration: GPU-hours and storage for all candidates, from the options only."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from mixtune.components.config import Config
from mixtune.components.mixed.config import candidates
from mixtune.components.shared.config import SCRATCH, Training

FLOPS_PER_PARAMETER_AND_TOKEN = 6
"""FLOPs of the forward and backward pass of a transformer, without attention, by the usual rule of thumb."""
GPU_FLOPS = 100e12
"""Assumed throughput of a data-centre GPU in bf16, in FLOP/s: about a third of an A100's peak."""
WEIGHT_BYTES, CHECKPOINT_BYTES = 4, 12
"""Bytes per parameter: float32 weights; weights with AdamW's two moments."""


@dataclass(frozen=True)
class Estimate:
    """Upper bounds, since rows are assumed to be full.

    Attributes:
        parameters: parameters of the model; None if they are unknown here.
        tokens: training tokens, over all stages and candidates; None if they depend on epochs.
        trainings: number of trainings: pretrain if it trains, finetune, and one for each candidate.
        models: number of stored models.
    """

    parameters: int | None
    tokens: int | None
    trainings: int
    models: int

    @property
    def gpu_hours(self) -> float | None:
        if self.parameters is None or self.tokens is None:
            return None
        return FLOPS_PER_PARAMETER_AND_TOKEN * self.parameters * self.tokens / GPU_FLOPS / 3600

    @property
    def sentences(self) -> list[str]:
        """Returns the estimate and its assumptions as sentences."""
        sentences = []
        if self.gpu_hours is not None and self.parameters and self.tokens:
            sentences.append(
                f"estimate: at most {_number(self.gpu_hours)} GPU-hours for {self.trainings} trainings "
                f"({_count(self.tokens)} tokens x {_count(self.parameters)} parameters x "
                f"{FLOPS_PER_PARAMETER_AND_TOKEN} FLOP, at an assumed {GPU_FLOPS / 1e12:.0f} TFLOP/s for each GPU; "
                "evaluations are not counted)"
            )
        elif self.parameters is None:
            sentences.append("estimate: no GPU-hours, since the base model's parameters cannot be counted from here")
        else:
            sentences.append(
                "estimate: no GPU-hours, since a stage is measured in epochs and the data is not read here"
            )
        if self.parameters:
            kept = self.parameters * WEIGHT_BYTES * self.models
            during = self.parameters * CHECKPOINT_BYTES * self.trainings
            sentences.append(
                f"estimate: about {_size(kept)} of storage for {self.models} models, and up to {_size(during)} for "
                "checkpoints while all candidates train at once (float32, AdamW)"
            )
        return sentences


def estimate(config: Config) -> Estimate:
    """Estimates the cost of a configuration. Reads only the header of a local model's weights."""
    shares = [one.replay_share or config.mixed.replay_share for one in candidates(config.mixed)]
    trainings: list[tuple[Training, float]] = [(config.finetune, 0.0), *((config.mixed, share) for share in shares)]
    if config.pretrain.trains:
        trainings.append((config.pretrain, 0.0))
    each = [_tokens(stage, config.model.max_length, share) for stage, share in trainings]
    tokens = None if None in each else sum(one for one in each if one is not None)
    return Estimate(_parameters(config), tokens, len(trainings), len(shares) + 2)


def _tokens(stage: Training, length: int, replay_share: float) -> int | None:
    """Returns the tokens of one training if all rows are full."""
    if stage.max_tokens:
        return stage.max_tokens
    if stage.epochs:
        return None
    # With both streams, the batch size counts labelled examples; text is added to it.
    return math.ceil(stage.steps * stage.batch_size * length / (1 - replay_share))


def _parameters(config: Config) -> int | None:
    if config.model.base == SCRATCH:
        shape = config.model.scratch
        # A Llama block: four square matrices in attention, three of the usual width 8/3 in the MLP.
        return 2 * shape.vocabulary_size * shape.hidden_size + shape.layers * 12 * shape.hidden_size**2
    folder = Path(config.model.base)
    if folder.is_dir():
        return sum(_in_file(file) for file in folder.glob("*.safetensors")) or None
    return None


def _in_file(file: Path) -> int:
    """Returns the number of parameters in a file of weights, from its header."""
    try:
        with file.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            header = json.loads(content.read(min(length, 100_000_000)))
        return sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, struct.error):
        return 0


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _size(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"
