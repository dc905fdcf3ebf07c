"""The data of an optimizer step: a pure function of (seed, step, stream), so that a position in the data is a single number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np

from ..artifacts import read_jsonl
from ..config import Task, Training
from ..data.prepared import Documents
from ..errors import RefusedError
from ..model.masking import Masking
from ..model.packing import Segment, pack_narrow, width_of
from ..task_kinds import TASK_KINDS

PRETRAIN_ID, FINETUNE_ID, MASKING_ID = 0, 1, 2
SHORTEST_WINDOW = 8  # in shorter windows, tokens would have hardly any context


class _Permutations:
    """A new permutation for every epoch, computed without replaying earlier epochs."""

    def __init__(self, size: int, seed: int, stream_id: int) -> None:
        self.size = size
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, stream_id, epoch]).permutation(size)
        )

    def __getitem__(self, position: int) -> int:
        return int(self._permutation(position // self.size)[position % self.size])


class PretrainStream:
    """Windows of `max_length` tokens over all concatenated documents. Segments do not cross document boundaries.

    A document that is cut at a window's end continues in another window as a separate segment.

    Args:
        documents: the text.
        max_length: tokens per window.
        seed: seed of the order and of the masks.
        masking: masked LM: selects the tokens to predict, anew at every position of the stream.
    """

    def __init__(self, documents: Documents, max_length: int, seed: int, masking: Masking | None = None) -> None:
        self._documents, self._max_length, self._seed, self._masking = documents, max_length, seed, masking
        self._order = _Permutations(max(1, -(-(len(documents.flat) - 1) // max_length)), seed, PRETRAIN_ID)

    def __len__(self) -> int:
        return self._order.size

    def with_windows_of(self, length: int) -> PretrainStream:
        """Returns a stream of the same text with windows of another length, in tokens."""
        return PretrainStream(self._documents, length, self._seed, self._masking)

    @property
    def mean_length(self) -> float:
        """Returns the average number of tokens in a window."""
        return len(self._documents.flat) / len(self)

    def name_of(self, index: int) -> str:
        """Returns the origin of a document, for messages."""
        return _name_of(self._documents, index)

    def item(self, position: int) -> list[Segment]:
        window = self._order[position]
        start = window * self._max_length
        end = min(start + self._max_length, len(self._documents.flat))
        offsets = self._documents.offsets
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        segments = []
        for index in range(first, len(offsets) - 1):
            if offsets[index] >= end:
                break
            low, high = max(start, int(offsets[index])), min(end, int(offsets[index + 1]))
            learned = self._documents.supervised(low, high)
            # The first token has no context and is never predicted.
            if high - low > 1 and (learned is None or len(learned)):
                piece = np.asarray(self._documents.flat[low:high])
                segments.append(Segment(piece, 1, -1, index, pretrain=True, supervised=learned))
        if self._masking is None:
            return segments
        draw = np.random.default_rng([self._seed, MASKING_ID, position])
        masked = [self._masking(segment, draw) for segment in segments]
        return [segment for segment in masked if segment is not None]


class FinetuneStream:
    """Labelled examples; each item is one example.

    Args:
        documents: the examples.
        seed: seed of the order.
        task: without a task head the loss is on tokens, otherwise on the example as a whole.
    """

    def __init__(self, documents: Documents, seed: int, task: Task) -> None:
        self._documents, self.task = documents, task
        self._order = _Permutations(len(documents), seed, FINETUNE_ID)

    def __len__(self) -> int:
        return self._order.size

    @property
    def mean_length(self) -> float:
        """Returns the average number of tokens in an example."""
        return float(self._documents.offsets[-1]) / max(len(self._documents), 1)

    def name_of(self, index: int) -> str:
        """Returns the origin of an example, for messages."""
        return _name_of(self._documents, index)

    def item(self, position: int) -> list[Segment]:
        index = self._order[position]
        tokens = np.asarray(self._documents.tokens(index))
        if TASK_KINDS[self.task].head is None:
            learned = self._documents.supervised(*self._documents.offsets[index : index + 2].tolist())
            return [Segment(tokens, int(self._documents.supervised_from[index]), -1, index, supervised=learned)]
        targets = tuple(float(value) for value in self._documents.targets[index])
        label, second_from = int(self._documents.labels[index]), int(self._documents.second_from[index])
        return [Segment(tokens, len(tokens), label, index, targets=targets, second_from=second_from)]


def _name_of(documents: Documents, index: int) -> str:
    record = next(islice(read_jsonl(documents.folder / "records.jsonl"), index, None))
    return f"{record['id']} ({record['source']})"


@dataclass(frozen=True)
class UnreadExamples:
    """Number and average length of labelled examples that are not read.

    Attributes:
        count: number of examples.
        mean_length: average tokens per example.
    """

    count: int
    mean_length: float

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class StepData:
    """All rows of one optimizer step, over all ranks, and the counts that normalise their losses.

    Attributes:
        rows: packed rows, of one stream or both.
        num_pretrain: N_pt, supervised tokens of the pretraining stream.
        num_finetune: N_ft, supervised tokens (with a task head: examples) of the fine-tuning stream.
        tokens_pretrain: all tokens of the pretraining stream, without padding.
        tokens_finetune: all tokens of the fine-tuning stream, without padding.
        max_length: maximum tokens per row; these rows can be narrower.
    """

    rows: list[list[Segment]]
    num_pretrain: int
    num_finetune: int
    tokens_pretrain: int
    tokens_finetune: int
    max_length: int

    @classmethod
    def packed(cls, windows: list[list[Segment]], examples: list[list[Segment]], max_length: int) -> StepData:
        """Packs the items of both streams into common rows.

        Args:
            windows: segments of each window of pretraining text.
            examples: segments of each labelled example.
            max_length: maximum tokens per row.
        """
        items = windows + examples
        rows = pack_narrow([width_of(item) for item in items], max_length)
        labelled = [segment for item in examples for segment in item]
        return cls(
            [[segment for index in row for segment in items[index]] for row in rows],
            sum(segment.num_supervised for item in windows for segment in item),
            sum(1 if segment.labelled else segment.num_supervised for segment in labelled),
            sum(map(width_of, windows)),
            sum(map(width_of, examples)),
            max_length,
        )

    def share(self, rank: int, world_size: int, micro_batch_size: int) -> Iterator[list[list[Segment]]]:
        """Yields the micro-batches of one rank. Every rank gets the same number, since each takes part in every backward pass.

        Args:
            micro_batch_size: number of rows of `max_length` tokens; for narrower rows the number is higher, for equal tokens.
        """
        if not self.rows:
            raise RefusedError(
                "data.pretrain: the windows of a step hold nothing that could be predicted (unknown or special tokens only); "
                "look at the data report"
            )
        per_rank = -(-len(self.rows) // world_size)
        blank = [Segment(self.rows[0][0].tokens[:2], 2, pretrain=True)]  # without supervised tokens
        of_rank = [
            self.rows[i] if i < len(self.rows) else blank for i in range(rank, per_rank * world_size, world_size)
        ]
        # As few micro-batches as fit, of even size, each with a fair share of both streams.
        fit = max(1, micro_batch_size * self.max_length // max(width_of(row) for row in self.rows))
        count = -(-len(of_rank) // fit)
        for number in range(count):
            yield of_rank[number::count]


@dataclass(frozen=True)
class Mix:
    """The number of items of each stream in an optimizer step.

    Attributes:
        pretrain: the pretraining stream, or None if it is not read.
        finetune: the fine-tuning stream, or None if it is not read.
        num_windows: windows of pretraining text in a step.
        num_examples: labelled examples in a step.
        epoch_steps: optimizer steps per epoch; can be fractional.
        unread_tokens: pretraining tokens that a step with λ above 0 would have read besides its examples.
    """

    pretrain: PretrainStream | None
    finetune: FinetuneStream | None
    num_windows: int
    num_examples: int
    max_length: int
    epoch_steps: float
    unread_tokens: float = 0.0

    @property
    def has_both(self) -> bool:
        """Tells whether both streams are read."""
        return self.pretrain is not None and self.finetune is not None

    @property
    def mean_tokens(self) -> float:
        """Returns a step's average tokens. All candidates have the same, so that `max_tokens` gives equal numbers of steps."""
        text = self.num_windows * self.pretrain.mean_length if self.pretrain is not None else self.unread_tokens
        return text + (self.num_examples * self.finetune.mean_length if self.finetune is not None else 0.0)

    def steps(self, training: Training) -> int:
        """Returns the optimizer steps of a stage, from `steps`, `epochs` or `max_tokens`; at least 1 for the latter two."""
        if training.max_tokens is not None:
            return max(1, round(training.max_tokens / self.mean_tokens))
        if training.epochs is not None:
            return max(1, math.ceil(round(training.epochs * self.epoch_steps, 9)))
        return training.steps

    def name_of(self, segment: Segment) -> str:
        """Returns the origin of a segment, for messages."""
        stream = self.pretrain if segment.pretrain else self.finetune
        return stream.name_of(segment.key) if stream is not None else "padding"

    def step(self, step: int) -> StepData:
        """Returns the data of one optimizer step."""
        windows: list[list[Segment]] = []
        examples: list[list[Segment]] = []
        if self.pretrain is not None:
            taken = range(step * self.num_windows, (step + 1) * self.num_windows)
            windows = [segments for position in taken if (segments := self.pretrain.item(position))]
        if self.finetune is not None:
            taken = range(step * self.num_examples, (step + 1) * self.num_examples)
            examples = [self.finetune.item(position) for position in taken]
        return StepData.packed(windows, examples, self.max_length)


def make_mix(
    pretrain: PretrainStream | None,
    finetune: FinetuneStream | None,
    batch_size: int,
    max_length: int,
    replay_share: float | None = None,
    unread: UnreadExamples | None = None,
) -> Mix:
    """Chooses number and length of the windows so that the pretraining stream has its share of an average step's tokens.

    Args:
        batch_size: labelled examples in a step; windows if the fine-tuning stream is not read.
        replay_share: fraction of the tokens from the pretraining stream, if both streams are given.
        unread: the labelled examples, if only the pretraining stream is read but steps and epochs should have as many tokens
            as with both streams.
    """
    if pretrain is None:
        assert finetune is not None
        unread_tokens = finetune.mean_length * batch_size * replay_share / (1 - replay_share) if replay_share else 0.0
        return Mix(None, finetune, 0, batch_size, max_length, len(finetune) / batch_size, unread_tokens)
    if replay_share is None:
        return Mix(pretrain, None, batch_size, 0, max_length, len(pretrain) / batch_size)
    examples = finetune if finetune is not None else unread
    assert examples is not None
    # Without labelled rows, the text also takes their tokens.
    share = replay_share / (1 - replay_share) + (finetune is None)
    tokens = share * examples.mean_length * batch_size
    num_windows = max(1, math.ceil(tokens / max_length))
    window = min(max_length, max(SHORTEST_WINDOW, round(tokens / num_windows)))
    taken = batch_size if finetune is not None else 0
    return Mix(pretrain.with_windows_of(window), finetune, num_windows, taken, max_length, len(examples) / batch_size)
