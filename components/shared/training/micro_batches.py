"""One rank's micro-batches of an optimizer step: a pure function of the step, so that they can be made ahead of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..model.packing import Batch, Segment, collate
from .streams import Mix, StepData


@dataclass(frozen=True)
class MicroBatches:
    """The data of one optimizer step.

    Attributes:
        data: of all ranks.
        rows: packed rows of each of this rank's micro-batches.
        batches: the same as tensors, in the memory of the CPU.
    """

    data: StepData
    rows: list[list[list[Segment]]]
    batches: list[Batch]

    def on(self, device: torch.device) -> Iterator[Batch]:
        """Copies the micro-batches to the device, one after the other."""
        return (batch.to(device) for batch in self.batches)


@dataclass(frozen=True)
class MicroBatchMaker:
    """Makes the micro-batches of one rank.

    Attributes:
        mix: the data of each optimizer step.
        rank: of this process.
        world: number of processes.
        micro_batch_size: rows of maximum length in one micro-batch.
        pad_id: token id for padding.
        width_multiple: rows are padded to a multiple of this width.
    """

    mix: Mix
    rank: int
    world: int
    micro_batch_size: int
    pad_id: int
    width_multiple: int

    def step(self, step: int) -> MicroBatches:
        """Returns the micro-batches of one optimizer step."""
        data = self.mix.step(step)
        rows = list(data.share(self.rank, self.world, self.micro_batch_size))
        return MicroBatches(data, rows, [self.collate(each) for each in rows])

    def collate(self, rows: list[list[Segment]]) -> Batch:
        """Converts rows to tensors."""
        return collate(rows, self.pad_id, width_multiple=self.width_multiple)
