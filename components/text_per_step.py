"""Estimates, before anything is read or trained, how much pretraining text an optimizer step of a mixed training predicts."""

from __future__ import annotations

from statistics import fmean

from .checks import is_masked
from .config import Config
from .mixed.config import candidates
from .shared.data.sources import first_rows
from .shared.task_kinds import TASK_KINDS

MIN_PREDICTED_TOKENS = 256
"""With fewer predicted tokens in a step, the text's gradient is large noise.

The gradient of N tokens of text that a model was pretrained on is mostly noise, with a norm that falls as 1/√N. In the
pretrained model of the demo it is 5.3 for 16 tokens, 3.5 for 42, 1.6 for 240, 0.8 for 1,024 and 0.4 for 4,096; that of 30,000
tokens is 0.2, and the cosine of the others with it is below 0.15. The gradient of 16 labelled examples with a new head has a
norm of 3.2: 42 tokens are as much noise as these, 240 tokens half of it.
"""
BYTES_PER_TOKEN = 4
"""UTF-8 bytes of a token in usual vocabularies: four letters, or one or two Chinese characters."""
READ_EXAMPLES = 200


def few_text_tokens(config: Config) -> str | None:
    """Says that the steps of the mixed candidates will predict few tokens of pretraining text. None if they predict enough.

    The length of the examples is that of the first ones in local files, by their bytes. For other sources it is at most
    `model.max_length`.
    """
    reads_both = [one for one in candidates(config.mixed) if one.mix_weight is None or 0 < one.mix_weight < 1]
    if not reads_both:
        return None
    length = example_tokens(config)
    known = length is not None
    of_tokens = min(one.replay_share or config.mixed.replay_share for one in reads_both)
    share = of_tokens / (1 - of_tokens)
    read = (
        share * config.mixed.batch_size * min(length if length is not None else float("inf"), config.model.max_length)
    )
    masked = is_masked(config)
    predicted = read * config.model.mask_probability if masked else read
    if round(predicted) >= MIN_PREDICTED_TOKENS:
        return None
    count = f"{'about' if known else 'at most'} {round(read):,}"
    what = f", of which {round(predicted):,} are masked and predicted" if masked else ""
    options = [
        "mixed.replay_shares" if config.mixed.replay_shares else "mixed.replay_share",
        "mixed.batch_size",
        *(["model.mask_probability"] if masked else []),
    ]
    return (
        f"{options[0]}: a step reads {count} tokens of pretraining text{what}; the gradient of fewer than "
        f"{MIN_PREDICTED_TOKENS} predicted tokens is noise that can drown the task: raise {' or '.join(options)}"
    )


def example_tokens(config: Config) -> float | None:
    """Estimates the mean length of a labelled example, in tokens; None if its source is not local."""
    labelled, longest = config.data.finetune, config.model.max_length
    kind = TASK_KINDS[labelled.task]
    roles = kind.inputs if kind.head is not None else tuple(kind.columns)
    sizes = [
        sum(len(row.values[role].encode()) for role in roles if role in row.values)
        for row in first_rows(labelled, READ_EXAMPLES)
    ]
    return fmean(min(size / BYTES_PER_TOKEN, longest) for size in sizes) if sizes else None
