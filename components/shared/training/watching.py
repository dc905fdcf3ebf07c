"""Watches a training on a small fixed sample of held-out data, and stops one that forgets too much for good.

The sample is read without dropout and without random numbers, so that a training that is watched has the same weights, to the
bit, as one that is not. All measurements are in the curve, and whether a training stops follows from the curve alone, also
after it was resumed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from accelerate import Accelerator

from ..artifacts import Stopped
from ..config import Task, Watch, Watching
from ..data.prepared import WATCH, DataManifest, Documents
from ..errors import RefusedError
from ..model.masking import Masking
from ..model.mixed_model import MixedModel
from ..model.packing import Segment, width_of
from ..model.sharding import release
from .interval import LogEntry
from .micro_batches import MicroBatchMaker
from .streams import FinetuneStream, StepData

FORGETTING = "watch_forgetting"
MASKS = 4
"""Number of the stream of random numbers that masks are drawn from. They are the same for all candidates and seeds."""
NO_TEXT = (
    "watch.every_steps: the prepared labelled data holds no sample of control text, on which forgetting is measured; raise "
    "data.pretrain.control_fraction, or give more pretraining text"
)
NO_SAMPLE = "{folder}: is missing; an earlier version of mixtune prepared the labelled data, so prepare it again"


@dataclass
class Watcher:
    """Measures forgetting and the task's loss during a training.

    Attributes:
        text: the held-out text.
        both: the text and the labelled examples; the text alone if the task is not trained.
        every_steps: optimizer steps between two measurements.
        bits_per_byte: what a rise of the loss by one nat per predicted token is in bits per byte.
        limit: forgetting that stops a training, in bits per byte; None stops nothing.
        patience: measurements in a row that are above it.
        reference: loss of the reference model on the text, in nats per predicted token.
    """

    text: StepData
    both: StepData
    every_steps: int
    bits_per_byte: float
    limit: float | None = None
    patience: int = 1
    reference: float | None = None

    @classmethod
    def load(
        cls, folder: str, options: Watching, task: Task | None, masking: Masking | None, max_length: int
    ) -> Self | None:
        """Reads the sample that `prepare` wrote.

        Args:
            folder: folder of the labelled training data.
            task: the task; None if it is not trained.
            masking: selects the masked tokens of a masked LM.
            max_length: tokens in a row.

        Returns:
            None if nothing is to be watched.

        Raises:
            RefusedError: if there is no sample, or no text in it.
        """
        if options.every_steps is None:
            return None
        sample = Path(folder) / WATCH
        if not sample.is_dir():
            raise RefusedError(NO_SAMPLE.format(folder=sample))
        info = DataManifest.load(sample).splits.get("control")
        windows = [] if info is None else _windows(Documents(sample, "control"), options.max_tokens, masking)
        if info is None or not windows:
            raise RefusedError(NO_TEXT)
        examples: list[list[Segment]] = []
        if task is not None:
            stream = FinetuneStream(Documents(sample, "dev"), 0, task)
            examples = [stream.item(position) for position in range(min(options.max_examples, len(stream)))]
        longest = max(map(width_of, (*windows, *examples)))
        text, both = (StepData.packed(windows, each, max(max_length, longest)) for each in ([], examples))
        predictable = info.tokens if info.supervised_tokens is None else info.supervised_tokens
        bits_per_byte = predictable / max(info.bytes, 1) / math.log(2)
        if not isinstance(options, Watch):
            return cls(text, both, options.every_steps, bits_per_byte)
        return cls(text, both, options.every_steps, bits_per_byte, options.max_forgetting, options.patience)

    def is_due(self, done: int) -> bool:
        """Tells whether the training is measured after this number of steps."""
        return done % self.every_steps == 0

    def read_reference(self, model: MixedModel, accelerator: Accelerator, maker: MicroBatchMaker) -> None:
        """Computes the loss that later ones are compared with. All ranks take part."""
        nats, _ = self._losses(model, self.text, accelerator, maker)
        self.reference = nats / max(self.text.num_pretrain, 1)

    def measure(self, model: MixedModel, done: int, accelerator: Accelerator, maker: MicroBatchMaker) -> LogEntry:
        """Measures the model after `done` steps. All ranks take part and get the same losses.

        Returns:
            An entry of the curve: forgetting in bits per byte, the losses of both streams, and the seconds that it took.
        """
        started = time.monotonic()
        nats, task = self._losses(model, self.both, accelerator, maker)
        loss = nats / max(self.both.num_pretrain, 1)
        if self.reference is None:  # the training starts from the reference model
            self.reference = loss
        entry: LogEntry = {
            "step": done,
            FORGETTING: _finite(self.bits_per_byte * (loss - self.reference)),
            "watch_loss_pretrain": _finite(loss),
        }
        if self.both.num_finetune:
            entry["watch_loss_finetune"] = _finite(task / self.both.num_finetune)
        return entry | {"watch_seconds": time.monotonic() - started}

    def stops(self, curve: Sequence[Mapping[str, Any]]) -> bool:
        """Tells whether the training is to be stopped: the limit is exceeded for good.

        Forgetting that falls may still fall below the limit, as it often does while the learning rate decays.
        """
        last = self._last(curve)
        falls = any(after < before for before, after in pairwise(last))
        return self.limit is not None and len(last) == self.patience and min(last) > self.limit and not falls

    def stopped(self, curve: Sequence[Mapping[str, Any]], step: int, planned_steps: int) -> Stopped:
        """Describes a training that was stopped."""
        return Stopped(step=step, planned_steps=planned_steps, limit=self.limit or 0.0, forgetting=self._last(curve))

    def _last(self, curve: Sequence[Mapping[str, Any]]) -> list[float]:
        """Returns the last measurements of forgetting, without that before the first step."""
        found = [float(entry[FORGETTING]) for entry in curve if entry.get(FORGETTING) is not None and entry["step"]]
        return found[-self.patience :]

    @torch.no_grad()
    def _losses(
        self, model: MixedModel, data: StepData, accelerator: Accelerator, maker: MicroBatchMaker
    ) -> tuple[float, float]:
        """Returns Σ ce of both streams, in nats, without dropout."""
        total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        trains = model.training
        model.eval()
        for rows in data.share(maker.rank, maker.world, maker.micro_batch_size):
            with accelerator.autocast():
                losses = model(maker.collate(rows).to(accelerator.device), 0.0, 0.0)
            total += torch.stack([losses["pretrain"].double(), losses["finetune"].double()])
        release(model)
        model.train(trains)
        nats, task = accelerator.reduce(total, "sum").tolist()
        return nats, task


def watched_digest(folder: str, options: Watching) -> dict[str, str]:
    """Returns the digest of the sample, as a part of a training's identity; empty if nothing is watched."""
    return {} if options.every_steps is None else {"watch": DataManifest.load(Path(folder) / WATCH).digest}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _windows(pieces: Documents, max_tokens: int, masking: Masking | None) -> list[list[Segment]]:
    """Returns the first pieces, which are in a random order, with about `max_tokens` tokens in all."""
    lengths = np.diff(pieces.offsets).tolist()
    windows = []
    for index, before in enumerate(accumulate(lengths[:-1], initial=0)):
        if before >= max_tokens:
            break
        learned = pieces.supervised(*pieces.offsets[index : index + 2].tolist())
        segment: Segment | None = Segment(
            np.asarray(pieces.tokens(index)), 1, -1, index, pretrain=True, supervised=learned
        )
        if masking is not None and segment is not None:
            segment = masking.for_measuring()(segment, np.random.default_rng([MASKS, index]))
        if segment is not None:
            windows.append([segment])
    return windows
