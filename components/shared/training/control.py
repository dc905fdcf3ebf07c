"""Measures forgetting during a training, on control text: pretraining text that no model trains on.

The reference model reads the text once, before the first step, and the trained model once after the last. Each measurement in
between reads the next few windows of it. W is the number of windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from accelerate import Accelerator

from ..model.mixed_model import MixedModel
from ..model.packing import Segment, collate, pack, width_of
from ..model.sharding import most_passes, release
from .streams import PretrainStream

MEASUREMENTS = 40
"""Measurements in a training, if it has as many steps."""
MIN_TOKENS = 32_768
"""Tokens that are read in any training, however short: fewer say too little about forgetting."""
TRAINING_COST = 3
"""Cost of a training token: a forward pass, and a backward pass that counts twice."""
REFERENCE_SHARE = 1 / 3
"""Share of all read tokens that the reference model reads, if the share is more than `REFERENCE_TOKENS`."""
REFERENCE_TOKENS = 65_536
"""Tokens that the reference model reads in any training, if there are as many: documents differ much in what is forgotten."""
LOGITS_AT_ONCE = 1 << 26  # maximum tokens x vocabulary in memory


@dataclass
class ControlText:
    """Windows of control text.

    Attributes:
        windows: segments of each window.
        every_steps: optimizer steps between two measurements.
        windows_at_once: windows of one measurement.
        max_length: maximum tokens per row.
        pad_id: token id for padding.
        micro_batch_size: rows of `max_length` tokens in one forward pass.
        reference: (W,) float64, Σ ce of the reference model on each window, in nats.
    """

    windows: list[list[Segment]]
    every_steps: int
    windows_at_once: int
    max_length: int
    pad_id: int
    micro_batch_size: int
    reference: np.ndarray | None = None

    @classmethod
    def plan(
        cls,
        stream: PretrainStream,
        cost: float,
        steps: int,
        mean_tokens: float,
        max_length: int,
        pad_id: int,
        micro_batch_size: int,
    ) -> ControlText:
        """Chooses how much text is read and how often.

        Args:
            stream: reads the control text.
            cost: cost of all measurements, as a fraction of the cost of the training; at least `MIN_TOKENS` are read. What the
                reference model reads beyond its share is not counted.
            steps: optimizer steps of the training.
            mean_tokens: tokens of an average step.
        """
        tokens = max(cost * TRAINING_COST * steps * mean_tokens, MIN_TOKENS)
        items = (stream.item(position) for position in range(len(stream)))
        windows: list[list[Segment]] = []
        left = max(REFERENCE_SHARE * tokens, REFERENCE_TOKENS)
        for item in items:
            if left <= 0:
                break
            if item:
                windows.append(item)
                left -= width_of(item)
        every_steps = max(1, steps // MEASUREMENTS)
        read = tokens - min(sum(map(width_of, windows)), REFERENCE_SHARE * tokens)
        at_once = round(read / max(1, steps // every_steps) / max_length)
        return cls(windows, every_steps, min(max(1, at_once), len(windows)), max_length, pad_id, micro_batch_size)

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """Returns (W,) int64, the predicted tokens of each window."""
        return np.array([sum(segment.num_supervised for segment in window) for window in self.windows], np.int64)

    def is_due(self, done: int) -> bool:
        """Tells whether forgetting is measured after this number of steps."""
        return done % self.every_steps == 0

    def read_reference(self, model: MixedModel, accelerator: Accelerator) -> None:
        """Computes the losses that later ones are compared with. All ranks take part."""
        self.reference = self._losses(model, range(len(self.windows)), accelerator)

    def measure(self, model: MixedModel, done: int, accelerator: Accelerator) -> tuple[float, int]:
        """Compares the model with the reference model. All ranks take part and get the same result.

        Args:
            done: completed steps. They determine which windows are read.

        Returns:
            The rise of Σ ce over the reference model, in nats, and the number of predicted tokens.
        """
        assert self.reference is not None
        first = (done // self.every_steps - 1) * self.windows_at_once
        numbers = [number % len(self.windows) for number in range(first, first + self.windows_at_once)]
        rise = self._losses(model, numbers, accelerator)[numbers] - self.reference[numbers]
        return float(rise.sum()), int(self.num_tokens[numbers].sum())

    def forgetting(self, model: MixedModel, accelerator: Accelerator) -> tuple[float, float]:
        """Compares the model with the reference model on all windows. All ranks take part and get the same result.

        Returns:
            The rise of the loss over the reference model's, in nats per token, and its standard error over windows (that of a
            ratio of sums, W. Cochran, Sampling Techniques, 1977, section 6.3); infinite for one window.
        """
        assert self.reference is not None
        rise_W = self._losses(model, range(len(self.windows)), accelerator) - self.reference
        count, tokens = len(self.windows), self.num_tokens.sum()
        found = float(rise_W.sum() / tokens)
        squares = float(((rise_W - found * self.num_tokens) ** 2).sum())
        return found, math.sqrt(count / (count - 1) * squares) / float(tokens) if count > 1 else math.inf

    @torch.no_grad()
    def _losses(self, model: MixedModel, numbers: Sequence[int], accelerator: Accelerator) -> np.ndarray:
        """Returns (W,) float64, Σ ce of each of the given windows, in nats; 0 for the others. Without dropout."""
        found_W = torch.zeros(len(self.windows), dtype=torch.float64, device=accelerator.device)
        mine = [
            [replace(segment, key=number) for segment in self.windows[number]]
            for number in numbers[accelerator.process_index :: accelerator.num_processes]
        ]
        rows = [
            [segment for index in row for segment in mine[index]]
            for row in pack([width_of(window) for window in mine], self.max_length)
        ]
        chunk = max(1, LOGITS_AT_ONCE // model.vocabulary_size)
        trains = model.training
        model.eval()
        passes = most_passes(model, math.ceil(len(rows) / self.micro_batch_size), accelerator.device)
        for number in range(passes):
            own = rows[number * self.micro_batch_size : (number + 1) * self.micro_batch_size]
            batch = collate(own or self.windows[:1], self.pad_id).to(accelerator.device)
            with accelerator.autocast():
                ce_N = model.lm_token_losses(batch, chunk)
            if own:  # else the others have one more pass, and this process only takes part
                found_W.index_add_(0, batch.lm_key, ce_N.double())
        release(model)
        model.train(trains)
        found: np.ndarray = accelerator.reduce(found_W, "sum").cpu().numpy()
        return found
