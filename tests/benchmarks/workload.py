"""What every contender trains on: the same model, the same segments in the same order, step by step.

Token ids are drawn by Zipf's law and lengths from fixed ranges, since the time of a step depends on shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from mixtune.components.shared.model.packing import Segment
from mixtune.components.shared.training.streams import StepData

Precision = Literal["float32", "bfloat16"]
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 0.01, 1.0
PAD_ID = 0


@dataclass(frozen=True)
class Size:
    """A model and the steps that it is trained on.

    Attributes:
        examples: labelled examples in a step: a prompt and a label.
        windows: texts in a step, each of `window` tokens: what `streams.make_mix` makes of a replay share of a third.
        prompt, label: numbers of tokens are drawn from these ranges, without the second.
        max_length: of a packed row, in tokens.
    """

    name: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    examples: int = 35
    windows: int = 5
    window: int = 117
    prompt: tuple[int, int] = (16, 48)
    max_length: int = 128
    label: tuple[int, int] = (1, 4)

    @property
    def intermediate(self) -> int:
        return -(-self.hidden * 8 // 3 // 16) * 16

    def model(self) -> LlamaForCausalLM:
        """A new model; the same weights every time."""
        set_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                max_position_embeddings=max(4096, self.max_length),
                tie_word_embeddings=True,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=PAD_ID,
            )
        )

    @property
    def sequences(self) -> int:
        """Texts and examples in a step."""
        return self.examples + self.windows

    def segments(self, step: int, seed: int = 0) -> list[Segment]:
        """The texts, then the examples, of one step."""
        draw = np.random.default_rng([seed, step])

        def tokens(length: int) -> np.ndarray:
            return np.minimum(draw.zipf(1.2, length) + 2, self.vocabulary - 1).astype(np.int64)

        texts = [Segment(tokens(self.window), 1, pretrain=True) for _ in range(self.windows)]
        examples = []
        for _ in range(self.examples):
            prompt, label = int(draw.integers(*self.prompt)), int(draw.integers(*self.label))
            examples.append(Segment(tokens(prompt + label), prompt))
        return texts + examples


class Steps:
    """The workload as mixtune's training loop reads it (what `streams.Mix` is for data on disk)."""

    def __init__(self, size: Size, seed: int = 0, labels_only: bool = False) -> None:
        self.size, self._seed, self._labels_only = size, seed, labels_only
        # The loop only asks whether a stream is read.
        self.pretrain = None if labels_only else True
        self.finetune = True

    def steps(self, training: object) -> int:
        return int(training.steps)  # type: ignore[attr-defined]

    def step(self, step: int) -> StepData:
        segments = self.size.segments(step, self._seed)
        if self._labels_only:  # a plain SFT step with as many tokens and as many labels: the texts are examples now
            segments = [Segment(one.tokens, one.supervised_from) for one in segments]
        text = [one for one in segments if one.pretrain]
        labelled = [one for one in segments if not one.pretrain]
        return StepData.packed([[one] for one in text], [[one] for one in labelled], self.size.max_length)


def rows_in_order(size: Size, steps: int) -> Iterator[dict[str, list[int]]]:
    """The same segments as rows of token ids and labels, the way every other trainer reads them."""
    for step in range(steps):
        for one in size.segments(step):
            labels = np.full(len(one.tokens), -100)
            labels[one.supervised_from :] = one.tokens[one.supervised_from :]
            yield {"input_ids": one.tokens.tolist(), "labels": labels.tolist()}


def supervised(rows: list[dict[str, list[int]]]) -> int:
    """Tokens with a label, after the shift."""
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows as tensors, padded to the longest."""
    width = max(len(row["input_ids"]) for row in rows)

    def tensor(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": tensor("input_ids", PAD_ID), "attention_mask": mask, "labels": tensor("labels", -100)}


def pooled_share(size: Size, step: int) -> float:
    """λ that pooling all supervised tokens of a step gives."""
    segments = size.segments(step)
    text = sum(one.num_supervised for one in segments if one.pretrain)
    return text / sum(one.num_supervised for one in segments)


def count_tokens(size: Size, first: int, last: int) -> tuple[int, int]:
    """Real and supervised tokens of steps first..last-1."""
    real = supervised = 0
    for step in range(first, last):
        for one in size.segments(step):
            real += len(one.tokens)
            supervised += one.num_supervised
    return real, supervised


def flops_of_step(size: Size, step: int, attention: bool = True) -> float:
    """FLOPs of the matrix products that one step needs: 6 for each weight and token, the LM head on supervised tokens only.

    Args:
        attention: whether to count attention's own products, over the tokens that a token may see.
    """
    layer = 4 * size.hidden**2 + 3 * size.hidden * size.intermediate
    total = 0.0
    for one in size.segments(step):
        length = len(one.tokens)
        total += 6 * size.layers * layer * length + 6 * size.vocabulary * size.hidden * one.num_supervised
        if attention:
            total += 6 * size.layers * size.hidden * length * (length + 1)
    return total


LLAMA15M = Size("llama15m", vocabulary=32_000, hidden=288, layers=6, heads=6)
DEFAULT = Size("default", vocabulary=4_096, hidden=192, layers=4, heads=4)
SIZES = {size.name: size for size in (LLAMA15M, DEFAULT)}


def first(count: int, rows: Iterator[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """The first rows, for checks."""
    return list(islice(rows, count))
