"""Measures forgetting on control text: pretraining text that no model trains on.

The reference model reads the text before the training, and the trained model after it. W is the number of windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from accelerate import Accelerator

from ..model.mixed_model import MixedModel
from ..model.packing import Segment, collate, pack, width_of
from ..model.sharding import most_passes, release
from .streams import PretrainStream

MIN_TOKENS = 65_536
"""Tokens that are read for any training, if there are as many: documents differ much in what is forgotten."""
TRAINING_COST = 3
"""Cost of a training token: a forward pass, and a backward pass that counts twice."""
READINGS = 2
"""Before a training and after it."""
LOGITS_AT_ONCE = 1 << 26  # maximum tokens x vocabulary in memory


@dataclass
class ControlText:
    """Windows of control text.

    Attributes:
        windows: segments of each window.
        max_length: maximum tokens per row.
        pad_id: token id for padding.
        micro_batch_size: rows of `max_length` tokens in one forward pass.
        reference: (W,) float64, Σ ce of the reference model on each window, in nats.
    """

    windows: list[list[Segment]]
    max_length: int
    pad_id: int
    micro_batch_size: int
    reference: np.ndarray | None = None

    @classmethod
    def plan(
        cls, stream: PretrainStream, cost: float, tokens: float, max_length: int, pad_id: int, micro_batch_size: int
    ) -> ControlText:
        """Chooses how much text is read.

        Args:
            stream: reads the control text.
            cost: cost of the readings, as a fraction of the cost of the training; at least `MIN_TOKENS` are read.
            tokens: tokens of the training.
        """
        left = max(cost * TRAINING_COST * tokens / READINGS, MIN_TOKENS)
        windows: list[list[Segment]] = []
        for item in (stream.item(position) for position in range(len(stream))):
            if left <= 0:
                break
            if item:
                windows.append(item)
                left -= width_of(item)
        return cls(windows, max_length, pad_id, micro_batch_size)

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """Returns (W,) int64, the predicted tokens of each window."""
        return np.array([sum(segment.num_supervised for segment in window) for window in self.windows], np.int64)

    def read_reference(self, model: MixedModel, accelerator: Accelerator) -> None:
        """Computes the losses that later ones are compared with. All ranks take part."""
        self.reference = self._losses(model, accelerator)

    def forgetting(self, model: MixedModel, accelerator: Accelerator) -> tuple[float, float]:
        """Compares the model with the reference model. All ranks take part and get the same result.

        Returns:
            The rise of the loss over the reference model's, in nats per token, and its standard error over windows (that of a
            ratio of sums, W. Cochran, Sampling Techniques, 1977, section 6.3); infinite for one window.
        """
        assert self.reference is not None
        rise_W = self._losses(model, accelerator) - self.reference
        count, tokens = len(self.windows), self.num_tokens.sum()
        found = float(rise_W.sum() / tokens)
        squares = float(((rise_W - found * self.num_tokens) ** 2).sum())
        return found, math.sqrt(count / (count - 1) * squares) / float(tokens) if count > 1 else math.inf

    @torch.no_grad()
    def _losses(self, model: MixedModel, accelerator: Accelerator) -> np.ndarray:
        """Returns (W,) float64, Σ ce of each window, in nats. Without dropout."""
        found_W = torch.zeros(len(self.windows), dtype=torch.float64, device=accelerator.device)
        mine = [
            [replace(segment, key=number) for segment in self.windows[number]]
            for number in range(accelerator.process_index, len(self.windows), accelerator.num_processes)
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
