"""How much held-out data an evaluation reads: what that costs in comparison with a training, and what the gate needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

from .checks import count_examples
from .compare.config import POWER
from .config import Config
from .mixed.config import candidates
from .shared.config import Training
from .shared.data.sources import count_records
from .shared.task_kinds import TASK_KINDS
from .text_per_step import example_tokens

SHARE = 0.05
"""Reading the text of one split costs at most this fraction of the training of a candidate, and so do its labelled examples: a
fifth in all, for both splits."""
FORWARD_SHARE = 1 / 3
"""A forward pass costs about a third of a training step on the same tokens: the backward pass costs twice as much (J. Kaplan et
al., arXiv:2001.08361, section 2.1)."""
SIZES = (50_000, 100_000, 200_000, 500_000)
"""Numbers of tokens to choose from. They are few, so that a small change of a training leaves the sample, and cached
evaluations, as they are."""
EXAMPLES = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
"""Numbers of labelled examples to choose from."""
FEWEST_EXAMPLES = 10_000
"""So many are read in any case. The default of `gate.max_score_drop` needs 5,000 to 7,000 if each answer is right or wrong and
there are a few candidates."""
FEWEST_GRADED = 1_000
"""The same where the metric grades each answer, so that two models differ by less on each."""
GRADED = ("token_f1", "rouge_l", "bleu", "chrf")
DISAGREEMENT = 0.2
"""Assumed share of the examples on which exactly one of two models is right."""
LARGEST_WATCH_SHARE = 0.1
"""`mixtune check` says so if watching a training costs more than this fraction of it."""


def auto_tokens(config: Config) -> int:
    """Returns what `evaluate.max_tokens: auto` stands for: the tokens of each split that a model reads to measure forgetting.

    The largest of `SIZES` that keeps to `SHARE` of the shorter of both trainings, fine-tuning and mixed, and at least the
    smallest. The length of the examples is estimated as in `text_per_step`.
    """
    trained = min(tokens for tokens, _ in _trained(config))
    return max([SIZES[0], *(size for size in SIZES if size <= SHARE / FORWARD_SHARE * trained)])


def auto_examples(config: Config) -> int:
    """Returns what `evaluate.max_examples: auto` stands for: the labelled examples of each split that a model answers.

    The largest of `EXAMPLES` that keeps to `SHARE` of the shorter of both trainings, and at least `FEWEST_EXAMPLES` or
    `FEWEST_GRADED`. Generating answers costs more than reading them, which is not counted.
    """
    fewest = FEWEST_GRADED if _metric(config) in GRADED else FEWEST_EXAMPLES
    trained = min(tokens / length for tokens, length in _trained(config))
    return max([fewest, *(size for size in EXAMPLES if size <= SHARE / FORWARD_SHARE * trained)])


def few_examples(config: Config) -> str | None:
    """Says how many examples the gate needs if it will decide on fewer. None if they are enough, or if that is not known.

    The standard error of a paired difference of accuracies is about √(d / n), where d is the share of the n examples on which
    exactly one of two models is right, and its interval is z standard errors wide on each side. The intervals of m candidates
    hold together with a coverage of 1 - (1 - coverage) / m for each (Bonferroni); the gate's are a little narrower, since
    candidates are alike. For the number of examples see `compare.multiplicity.Power`.
    """
    labelled, gate = config.data.finetune, config.gate
    if _metric(config) not in ("accuracy", "exact_match") or gate.max_score_drop == 0:
        return None
    if labelled.dev_source:
        found = count_records(labelled.dev_source, "data.finetune.dev_source")
    else:
        whole = count_examples(labelled)
        found = None if whole is None else round(min(whole, labelled.max_documents or whole) * labelled.dev_fraction)
    read = auto_examples(config) if config.evaluate.max_examples == "auto" else config.evaluate.max_examples
    most, remedy = "about", "give more examples"
    if read is not None and (found is None or read < found):
        found, most, remedy = read, "at most", "raise evaluate.max_examples"
    contest = max(1, sum(one.seed is None for one in candidates(config.mixed)) + config.evaluate.num_alphas)
    z = NormalDist().inv_cdf(1 - (1 - gate.interval) / (2 * contest))
    needed = math.ceil(DISAGREEMENT * ((z + NormalDist().inv_cdf(POWER)) / gate.max_score_drop) ** 2)
    if found is None or found >= needed:
        return None
    chance = NormalDist().cdf(gate.max_score_drop * math.sqrt(found / DISAGREEMENT) - z)
    return (
        f"gate.max_score_drop: the gate will decide on {most} {found:,} examples of dev. With these, a candidate as good as "
        f"fine-tuning alone, one of {contest}, meets the margin of {gate.max_score_drop:g} with a chance of about {chance:.0%} "
        f"(if two models disagree on {DISAGREEMENT:.0%} of them), and about {needed:,} are needed for {POWER:.0%}; {remedy}, "
        "or accept a larger margin"
    )


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


def _metric(config: Config) -> str:
    return config.evaluate.metric or TASK_KINDS[config.data.finetune.task].metrics[0]


def _trained(config: Config) -> Iterator[tuple[float, float]]:
    """Yields the tokens of a training of each stage, fine-tuning and mixed, and those of a labelled example."""
    length = min(example_tokens(config) or math.inf, config.model.max_length)
    for stage, text in ((config.finetune, 1.0), (config.mixed, 1 / (1 - config.mixed.replay_share))):
        yield _tokens(config, stage, length * text), length


def _tokens(config: Config, stage: Training, tokens_per_example: float) -> float:
    """Returns the tokens that a stage trains on; infinite if the number of examples matters and is not known."""
    if stage.max_tokens is not None:
        return stage.max_tokens
    if stage.epochs is None:
        return stage.steps * stage.batch_size * tokens_per_example
    examples = count_examples(config.data.finetune)
    return math.inf if examples is None else stage.epochs * examples * tokens_per_example
