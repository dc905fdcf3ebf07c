"""The data of an optimizer step: a pure function of (seed, step, stream), so that a position in the data is a single number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
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

PRETRAIN_ID, FINETUNE_ID, MASKING_ID, SAMPLING_ID = 0, 1, 2, 3
COUNTED_ITEMS = 1024  # of each stream, whose mean number of supervised tokens sampling weights are computed from
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

    Attributes:
        weights: weight of each example in the mean loss; None if all are 1.
    """

    def __init__(self, documents: Documents, seed: int, task: Task) -> None:
        self._documents, self.task = documents, task
        self.weights: np.ndarray | None = None
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
        return [self.segment(self._order[position])]

    def segment(self, index: int) -> Segment:
        """Returns an example by its index in the data."""
        tokens = np.asarray(self._documents.tokens(index))
        weight = 1.0 if self.weights is None else float(self.weights[index])
        if TASK_KINDS[self.task].head is None:
            learned = self._documents.supervised(*self._documents.offsets[index : index + 2].tolist())
            first = int(self._documents.supervised_from[index])
            return Segment(tokens, first, -1, index, supervised=learned, weight=weight)
        targets = tuple(float(value) for value in self._documents.targets[index])
        label, second_from = int(self._documents.labels[index]), int(self._documents.second_from[index])
        return Segment(tokens, len(tokens), label, index, targets=targets, second_from=second_from, weight=weight)


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
        sum_finetune: the sum of the weights of what `num_finetune` counts; the same number if all weights are 1.
    """

    rows: list[list[Segment]]
    num_pretrain: int
    num_finetune: int
    tokens_pretrain: int
    tokens_finetune: int
    max_length: int
    sum_finetune: float = -1.0

    def __post_init__(self) -> None:
        if self.sum_finetune < 0:
            object.__setattr__(self, "sum_finetune", self.num_finetune)

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
        counts = [1 if segment.labelled else segment.num_supervised for segment in labelled]
        return cls(
            [[segment for index in row for segment in items[index]] for row in rows],
            sum(segment.num_supervised for item in windows for segment in item),
            sum(counts),
            sum(map(width_of, windows)),
            sum(map(width_of, examples)),
            max_length,
            sum(segment.weight * count for segment, count in zip(labelled, counts, strict=True)),
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

    def positions(self, step: int) -> tuple[range, range]:
        """Returns the positions in both streams that one optimizer step reads."""
        taken = step * self.num_windows, (step + 1) * self.num_windows
        return range(*taken), range(step * self.num_examples, (step + 1) * self.num_examples)

    def step(self, step: int) -> StepData:
        """Returns the data of one optimizer step."""
        windows: list[list[Segment]] = []
        examples: list[list[Segment]] = []
        of_text, of_labels = self.positions(step)
        if self.pretrain is not None:
            windows = [segments for position in of_text if (segments := self.pretrain.item(position))]
        if self.finetune is not None:
            examples = [self.finetune.item(position) for position in of_labels]
        return StepData.packed(windows, examples, self.max_length)


@dataclass(frozen=True)
class SampledMix(Mix):
    """Draws the stream of each of a step's items, as frameworks do that mix data sets by sampling.

    An item comes from the pretraining stream with the share of its windows among the items of a `Mix`.

    Attributes:
        drawn: (steps + 1,) windows that were drawn before each step.
    """

    drawn: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    @classmethod
    def of(cls, mix: Mix, steps: int, seed: int) -> SampledMix:
        """Creates it from a mix of both streams, whose numbers of items become means."""
        items = mix.num_windows + mix.num_examples
        counts = np.random.default_rng([seed, SAMPLING_ID]).binomial(items, mix.num_windows / items, steps)
        given = {each.name: getattr(mix, each.name) for each in fields(Mix)}
        return cls(**given, drawn=np.concatenate([[0], np.cumsum(counts)]))

    def positions(self, step: int) -> tuple[range, range]:
        """Returns the positions in both streams that one optimizer step reads."""
        items = self.num_windows + self.num_examples
        first, last = self.drawn[step : step + 2].tolist()
        return range(first, last), range(step * items - first, (step + 1) * items - last)

    def mean_counts(self) -> tuple[float, float]:
        """Returns the means of N_pt and N_ft over the steps, estimated on the first items of each stream."""
        assert self.pretrain is not None
        assert self.finetune is not None
        windows = [self.pretrain.item(position) for position in range(min(len(self.pretrain), COUNTED_ITEMS))]
        examples = [self.finetune.item(position) for position in range(min(len(self.finetune), COUNTED_ITEMS))]
        of_text = StepData.packed([one for one in windows if one], [], self.max_length).num_pretrain / len(windows)
        of_labels = StepData.packed([], examples, self.max_length).num_finetune / len(examples)
        return self.num_windows * of_text, self.num_examples * of_labels


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
