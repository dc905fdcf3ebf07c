"""What reading held-out data costs in comparison with a training: chooses how much text an evaluation reads, and tells where
watching a training is dear.
"""

from __future__ import annotations

import math

from .checks import count_examples
from .config import Config
from .shared.config import Training
from .text_per_step import example_tokens

SHARE = 0.05
"""Reading the text of one split costs at most this fraction of the training of a candidate."""
FORWARD_SHARE = 1 / 3
"""A forward pass costs about a third of a training step on the same tokens: the backward pass costs twice as much (J. Kaplan et
al., arXiv:2001.08361, section 2.1)."""
SIZES = (50_000, 100_000, 200_000, 500_000)
"""Numbers of tokens to choose from. They are few, so that a small change of a training leaves the sample, and cached
evaluations, as they are."""
LARGEST_WATCH_SHARE = 0.1
"""`mixtune check` says so if watching a training costs more than this fraction of it."""


def auto_tokens(config: Config) -> int:
    """Returns what `evaluate.max_tokens: auto` stands for: the tokens of each split that a model reads to measure forgetting.

    The largest of `SIZES` that keeps to `SHARE` of the shorter of both trainings, fine-tuning and mixed, and at least the
    smallest. The length of the examples is estimated as in `text_per_step`.
    """
    length = min(example_tokens(config) or math.inf, config.model.max_length)
    stages: list[tuple[Training, float]] = [(config.finetune, 1.0), (config.mixed, 1 / (1 - config.mixed.replay_share))]
    trained = min(_tokens(config, stage, length * more) for stage, more in stages)
    return max([SIZES[0], *(size for size in SIZES if size <= SHARE / FORWARD_SHARE * trained)])


def costly_watch(config: Config) -> str | None:
    """Says that watching the trainings costs much. None if it costs little, or if the length of the examples is not known."""
    watch, length = config.watch, example_tokens(config)
    if watch.every_steps is None or length is None:
        return None
    steps = (config.finetune.batch_size, config.mixed.batch_size / (1 - config.mixed.replay_share))
    read = watch.max_tokens + watch.max_examples * length
    share = FORWARD_SHARE * read / (watch.every_steps * min(steps) * length)
    if share <= LARGEST_WATCH_SHARE:
        return None
    return (
        f"watch.every_steps: a measurement every {watch.every_steps:,} steps costs up to about {share:.0%} of a training; "
        "raise it, or lower watch.max_tokens and watch.max_examples"
    )


def _tokens(config: Config, stage: Training, tokens_per_example: float) -> float:
    """Returns the tokens that a stage trains on; infinite if the number of examples matters and is not known."""
    if stage.max_tokens is not None:
        return stage.max_tokens
    if stage.epochs is None:
        return stage.steps * stage.batch_size * tokens_per_example
    examples = count_examples(config.data.finetune)
    return math.inf if examples is None else stage.epochs * examples * tokens_per_example
